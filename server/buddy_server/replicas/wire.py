"""What a replica of the engine tells the ingress, as msgpack."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import Event, StepTime, Usage
from buddy_server.engine.wire import Ready


class Progress(Struct, frozen=True, array_like=True):
    """Events of one request that came together, and what it has used so far, unless they end it."""

    events: list[Event]
    usage: Usage | None


class ReplicaState(Struct, frozen=True, array_like=True):
    """One replica as its engine is now (EngineClient in engine/messages.py); `step_time` is since the last report."""

    is_ready: bool
    num_running: int
    kv_usage_ratio: float
    queue_s: float
    step_time: StepTime


encode = msgpack.Encoder().encode
decode_ready = msgpack.Decoder(Ready).decode
decode_progress = msgpack.Decoder(Progress).decode
decode_state = msgpack.Decoder(ReplicaState).decode
