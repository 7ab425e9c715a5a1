"""What a replica of the engine tells the ingress, as msgpack."""

from msgspec import Struct, msgpack

from buddy_server.engine.messages import Event, Usage
from buddy_server.engine.wire import Ready

VERSION = "version"
"""A replica's metadata has it under this name (EngineReplica)."""
STAY_S = 3.0
"""How long a call of EngineReplica.stay takes."""


class Progress(Struct, frozen=True, array_like=True):
    """Events of one request that came together, and what it has used so far, unless they end it."""

    events: list[Event]
    usage: Usage | None


def member_name(version: str, replica: str) -> str:
    """The name of an ingress or a replica of the engine in the fleet, which those of all versions share."""
    return f"{version}/{replica}"


def is_of_version(member: str, version: str) -> bool:
    return member.startswith(f"{version}/")


encode = msgpack.Encoder().encode
decode_ready = msgpack.Decoder(Ready).decode
decode_progress = msgpack.Decoder(Progress).decode
