"""What a member of a fleet tells the others, as msgpack."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import Served, StepTime


class EngineReport(Struct, frozen=True, array_like=True):
    """A member's engine as it is now (engine/process.py). `step_time` and `served` are sums since its start."""

    is_ready: bool
    num_running: int
    max_sequences: int
    kv_usage_ratio: float
    queue_s: float
    step_time: StepTime = StepTime()
    served: Served = {}
    waiting_tenants: frozenset[tuple[str, int]] = frozenset()


class Decision(Struct, frozen=True, array_like=True):
    """How deep engines may run: the level of elastic budgets (tenancy/elastic.py), and the limits that follow from it,
    as in EngineProcess.limit_depth."""

    level: int
    limits: dict[str, int]


class Entry(Struct, frozen=True, array_like=True):
    """`count` is another in every entry: a member whose entry stays the same has gone. `engine` is None if it has
    none. `decision` is None if it may not decide."""

    count: int
    engine: EngineReport | None = None
    decision: Decision | None = None


encode_entry = msgpack.Encoder().encode
decode_entry = msgpack.Decoder(Entry).decode
