"""What goes to the engine's loop and what comes back: queued within a process, as msgpack between two."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import EngineInfo, Event, GenerationRequest, Served, StepStats, Usage
from buddy_server.engine.settings import EnginePlan


class Build(Struct, frozen=True, array_like=True, tag=True):
    """The first command to a worker."""

    plan: EnginePlan


class Submit(Struct, frozen=True, array_like=True, tag=True):
    request: GenerationRequest


class Cancel(Struct, frozen=True, array_like=True, tag=True):
    request_id: str


class LimitDepth(Struct, frozen=True, array_like=True, tag=True):
    """As in EngineProcess.limit_depth."""

    limits: dict[str, int]


class ChargeElsewhere(Struct, frozen=True, array_like=True, tag=True):
    """As in EngineProcess.charge_elsewhere."""

    served: Served
    waiting: frozenset[tuple[str, int]]


class Stop(Struct, frozen=True, array_like=True, tag=True):
    """The last command: every request ends as cancelled."""


LoopCommand = Submit | Cancel | LimitDepth | ChargeElsewhere | Stop
Command = Build | LoopCommand


class Building(Struct, frozen=True, array_like=True, tag=True):
    """Build has arrived, and both sockets are connected."""


class Ready(Struct, frozen=True, array_like=True, tag=True):
    """`directory` is the model's, which also contains the tokenizer."""

    info: EngineInfo
    directory: str


class BuildFailed(Struct, frozen=True, array_like=True, tag=True):
    """`reason` is one line for the user."""

    reason: str


class Report(Struct, frozen=True, array_like=True, tag=True):
    """Events by request id, in order; the usage so far of the step's unfinished requests; the step's statistics, if
    there was one; the engine's state after it; what it has run since the last report; the tenants that wait, with the
    priority."""

    events: list[tuple[str, Event]]
    usages: list[tuple[str, Usage]]
    stats: StepStats | None
    num_running: int
    kv_usage_ratio: float
    queue_s: float
    served: Served
    waiting_tenants: frozenset[tuple[str, int]]


class Heartbeat(Struct, frozen=True, array_like=True, tag=True):
    """The engine is alive: it waits for work, or its step has not taken too long yet."""


WorkerEvent = Building | Ready | BuildFailed | Report | Heartbeat

encode = msgpack.Encoder().encode
decode_command = msgpack.Decoder(Command).decode
decode_event = msgpack.Decoder(WorkerEvent).decode


def commands_address(directory: str) -> str:
    """Where a worker receives commands: a socket in a directory that only its user may enter."""
    return f"ipc://{directory}/commands"


def events_address(directory: str) -> str:
    """Where its parent receives events."""
    return f"ipc://{directory}/events"
