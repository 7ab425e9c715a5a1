"""What crosses between the engine's process and its parent arrives as it was."""

import pytest

from buddy_routing.action_space import ActionSpace
from buddy_server.engine.messages import (
    DepthCount,
    DepthEvent,
    EngineInfo,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    StartEvent,
    StepStats,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from buddy_server.engine.settings import EnginePlan, EngineSettings
from buddy_server.engine.wire import (
    Build,
    BuildFailed,
    Building,
    Cancel,
    ChargeElsewhere,
    Command,
    Heartbeat,
    LimitDepth,
    Ready,
    Report,
    Stop,
    Submit,
    WorkerEvent,
    decode_command,
    decode_event,
    encode,
)

SAMPLING = SamplingParams(
    max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, presence_penalty=-2.0, frequency_penalty=2.0,
    logit_bias={7: -100.0, 0: 1.5}, seed=2**63 - 1, stop=("\n", "ö🐦"), stop_token_ids=(1, 2), top_logprobs=0,
    prompt_logprobs=5,
)  # fmt: skip
CAT = TokenLogprob(1, " cat", -0.5)
NEVER = TokenLogprob(2, "\x00", float("-inf"))
USAGE = Usage(4, 3, 1, 8000, 2**40)
EVENTS = [
    ("a", DepthEvent(3000)),
    ("a", StartEvent(0.25)),
    ("a", PromptEvent((CAT, NEVER), ((NEVER,), ()))),
    ("a", TokenEvent(1, " cat", bytes([1, 0, 1]), CAT, (CAT, NEVER))),
    ("b", TokenEvent(2, "", b"")),
    ("b", FinishEvent("error", USAGE, text="ö", error="why", max_cost=2000)),
]
STATS = StepStats(3, 9, 2, 6, 1, 0.25, {"acme": DepthCount(3, 4, 1)})
INFO = EngineInfo(
    "m",
    ActionSpace.skip_or_run(8),
    100,
    256,
    512,
    16,
    "learned",
    "cpu",
    "bfloat16",
    "dpbf16",
    "fp_1",
    has_predictor=True,
)


@pytest.mark.parametrize(
    "command",
    [
        Build(EnginePlan("model", None, EngineSettings(0.5, max_sequences=3), "cpu", "int8")),
        Submit(GenerationRequest("a", "acme", (1, 2, 3), 4000, SAMPLING, align_paths=True, min_cost=2000)),
        Submit(GenerationRequest("a", "acme", (1,), 4000, SamplingParams(1))),
        Submit(GenerationRequest("a", "acme", (1,), 4000, SamplingParams(1), weight=0.5, priority=-1, tier="free")),
        Cancel("a"),
        LimitDepth({"free": 3000}),
        ChargeElsewhere({("acme", 0): 2**40, ("ö", -1): 1}, frozenset({("acme", 0)})),
        Stop(),
    ],
)
def test_commands_arrive_as_they_were(command: Command) -> None:
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize(
    "event",
    [
        Building(),
        Ready(INFO, "/models/m"),
        BuildFailed("no such model 'ö'"),
        Report(
            EVENTS, [("a", USAGE)], STATS, 2, 0.5, 0.25, {("acme", 0): 2000, ("acme", 5): 3000}, frozenset({("a", 0)})
        ),
        Report([], [], None, 0, 0.0, 0.0, {}, frozenset()),
        Heartbeat(),
    ],
)
def test_worker_events_arrive_as_they_were(event: WorkerEvent) -> None:
    assert decode_event(encode(event)) == event
