"""What crosses between the engine's process and its parent arrives as it was."""

import pytest

from buddy_server.engine.messages import (
    DepthCount,
    EngineInfo,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    StepStats,
    TokenEvent,
    TokenLogprob,
)
from buddy_server.engine.settings import EnginePlan, EngineSettings
from buddy_server.engine.wire import (
    Build,
    BuildFailed,
    Building,
    Cancel,
    Command,
    PredictDepth,
    PredictedDepth,
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
EVENTS = [
    ("a", PromptEvent((CAT, NEVER), ((NEVER,), ()))),
    ("a", TokenEvent(1, " cat", (0, 3, 7), CAT, (CAT, NEVER))),
    ("b", TokenEvent(2, "", (0, 7))),
    ("b", FinishEvent("error", 4, 1, 8, 2, text="ö", error="why", cached_tokens=3)),
]
STATS = StepStats(3, 9, 2, 6, 1, 0.25, {"acme": DepthCount(3, 4)})
INFO = EngineInfo("m", 8, 100, 256, 512, "learned", "cpu", "bfloat16", "dpbf16")


@pytest.mark.parametrize(
    "command",
    [
        Build(EnginePlan("model", None, EngineSettings(0.5, max_sequences=3), "cpu", "int8")),
        Submit(GenerationRequest("a", "acme", (1, 2, 3), 4, SAMPLING, align_paths=True)),
        Submit(GenerationRequest("a", "acme", (1,), 4, SamplingParams(1))),
        Cancel("a"),
        PredictDepth(7, (1, 2), 2, 8),
        Stop(),
    ],
)
def test_commands_arrive_as_they_were(command: Command) -> None:
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize(
    "event",
    [
        Building(),
        Ready(INFO, "/models/m", True),
        BuildFailed("no such model 'ö'"),
        Report(EVENTS, STATS, 2, 0.5),
        Report([], None, 0, 0.0),
        PredictedDepth(7, 5),
        PredictedDepth(8, None),
    ],
)
def test_worker_events_arrive_as_they_were(event: WorkerEvent) -> None:
    assert decode_event(encode(event)) == event
