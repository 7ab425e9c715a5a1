"""Names for what a route block holds, so that the same work is found again and nobody else's ever is."""

import secrets
from array import array
from hashlib import blake2b

from buddy_server.engine.messages import GenerationRequest


class PrefixKeys:
    """A chain of hashes: the key of a route block is made of the one before and its own `route_block` tokens.

    Before the first stands what else K/V and running features depend on: the router and what a token may cost, for
    these choose the paths. The tenant is there too, so that nobody learns by the clock what another has asked. A
    salt of this object's own keeps keys from being computed beforehand.
    """

    def __init__(self, router_id: str, route_block: int) -> None:
        self.route_block = route_block
        self._router_id = router_id
        self._salt = secrets.token_bytes(32)

    def of(self, request: GenerationRequest, max_cost: int) -> tuple[bytes, ...]:
        """The keys of the full route blocks of the prompt, run at `max_cost` milli-layers a token."""
        key = self._digest(repr((self._router_id, max_cost, request.tenant)).encode())
        tokens = array("q", request.prompt_tokens)
        keys: list[bytes] = []
        for end in range(self.route_block, len(tokens) + 1, self.route_block):
            key = self._digest(key + tokens[end - self.route_block : end].tobytes())
            keys.append(key)
        return tuple(keys)

    def _digest(self, content: bytes) -> bytes:
        return blake2b(content, digest_size=32, key=self._salt).digest()
