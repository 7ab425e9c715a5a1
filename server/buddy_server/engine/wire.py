"""What goes to the engine's loop and what comes from it: queued within a process, as msgpack between two."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import EngineInfo, Event, GenerationRequest, StepStats, Usage
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


LoopCommand = Submit | Cancel | Stop
Command = Build | LoopCommand


class Building(Struct, frozen=True, array_like=True, tag=True):
    """Build has arrived: both sockets are connected."""


class Ready(Struct, frozen=True, array_like=True, tag=True):
    """`directory` is the model's, which has the tokenizer too."""

    info: EngineInfo
    directory: str


class BuildFailed(Struct, frozen=True, array_like=True, tag=True):
    """`reason` is for the user, and one line."""

    reason: str


class Report(Struct, frozen=True, array_like=True, tag=True):
    """Events by request id, in order, what the requests of the step that go on have used by now, and the step's
    figures, if there was one; how the engine stands after it."""

    events: list[tuple[str, Event]]
    usages: list[tuple[str, Usage]]
    stats: StepStats | None
    num_running: int
    kv_usage_ratio: float


class Heartbeat(Struct, frozen=True, array_like=True, tag=True):
    """The engine goes on: it waits for work, or its step has not taken too long yet."""


WorkerEvent = Building | Ready | BuildFailed | Report | Heartbeat

encode = msgpack.Encoder().encode
decode_command = msgpack.Decoder(Command).decode
decode_event = msgpack.Decoder(WorkerEvent).decode


def commands_address(directory: str) -> str:
    """Where a worker takes commands: a socket in a directory that only its user may enter."""
    return f"ipc://{directory}/commands"


def events_address(directory: str) -> str:
    """Where its parent takes events."""
    return f"ipc://{directory}/events"
