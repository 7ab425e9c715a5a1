"""What a member of a fleet tells the others, as msgpack."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import Served, StepTime


class EngineReport(Struct, frozen=True, array_like=True):
    """A member's engine as it is now (EngineClient in engine/messages.py). `step_time` and `served` are sums since its
    start."""

    is_ready: bool
    num_running: int
    max_sequences: int
    kv_usage_ratio: float
    queue_s: float
    step_time: StepTime = StepTime()
    served: Served = {}


class Entry(Struct, frozen=True, array_like=True):
    """`count` is another in every entry: a member whose entry stays the same has gone. `engine` is None if it has
    none. `limits` are those of EngineProcess.limit_depth, None if it does not decide on them."""

    count: int
    engine: EngineReport | None = None
    limits: dict[str, int] | None = None


encode_entry = msgpack.Encoder().encode
decode_entry = msgpack.Decoder(Entry).decode
