"""What goes to the engine's loop and what comes from it: queued within a process, as msgpack between two."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import EngineInfo, Event, GenerationRequest, StepStats
from buddy_server.engine.settings import EnginePlan


class Build(Struct, frozen=True, array_like=True, tag=True):
    """The first command to a worker."""

    plan: EnginePlan


class Submit(Struct, frozen=True, array_like=True, tag=True):
    request: GenerationRequest


class Cancel(Struct, frozen=True, array_like=True, tag=True):
    request_id: str


class Stop(Struct, frozen=True, array_like=True, tag=True):
    """The last command: every request ends as cancelled."""


class PredictDepth(Struct, frozen=True, array_like=True, tag=True):
    """The arguments of DepthPredictor.choose; the answer bears the same `question_id`."""

    question_id: int
    prompt_tokens: tuple[int, ...]
    lowest: int
    highest: int


LoopCommand = Submit | Cancel | Stop
Command = Build | PredictDepth | LoopCommand


class Building(Struct, frozen=True, array_like=True, tag=True):
    """Build has arrived: both sockets are connected."""


class Ready(Struct, frozen=True, array_like=True, tag=True):
    """`directory` is the model's, which has the tokenizer too."""

    info: EngineInfo
    directory: str
    has_predictor: bool


class BuildFailed(Struct, frozen=True, array_like=True, tag=True):
    """`reason` is for the user, and one line."""

    reason: str


class Report(Struct, frozen=True, array_like=True, tag=True):
    """Events by request id, in order; the figures of the step they come from, if they come from one; how the engine
    stands after it."""

    events: list[tuple[str, Event]]
    stats: StepStats | None
    num_running: int
    kv_usage_ratio: float


class PredictedDepth(Struct, frozen=True, array_like=True, tag=True):
    """`num_run_layers` None: the prediction failed."""

    question_id: int
    num_run_layers: int | None


WorkerEvent = Building | Ready | BuildFailed | Report | PredictedDepth

encode = msgpack.Encoder().encode
decode_command = msgpack.Decoder(Command).decode
decode_event = msgpack.Decoder(WorkerEvent).decode


def commands_address(directory: str) -> str:
    """Where a worker takes commands: a socket in a directory that only its user may enter."""
    return f"ipc://{directory}/commands"


def events_address(directory: str) -> str:
    """Where its parent takes events."""
    return f"ipc://{directory}/events"
