"""What a replica of the engine tells the ingress, as msgpack."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import Event, Usage
from buddy_server.engine.wire import Ready


class Progress(Struct, frozen=True, array_like=True):
    """Events of one request that came together, and what it has used so far, unless they end it."""

    events: list[Event]
    usage: Usage | None


encode = msgpack.Encoder().encode
decode_ready = msgpack.Decoder(Ready).decode
decode_progress = msgpack.Decoder(Progress).decode
