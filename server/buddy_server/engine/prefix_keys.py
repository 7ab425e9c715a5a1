"""Keys for the content of a route block, so that the same work is found again, but never another tenant's."""

import secrets
from array import array
from hashlib import blake2b

from buddy_server.engine.messages import GenerationRequest


class PrefixKeys:
    """A chain of hashes: the key of a route block is made from the previous key and its own `route_block` tokens.

    The chain starts with what else K/V and running features depend on: the router and the cost limit of a token, which
    determine the paths. It includes the tenant, so that nobody can learn from timing what another tenant has asked. A
    salt keeps keys from being precomputed; one that is not given is drawn at random.
    """

    def __init__(self, router_id: str, route_block: int, salt: bytes | None = None) -> None:
        self.route_block = route_block
        self._router_id = router_id
        self._salt = secrets.token_bytes(32) if salt is None else salt

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
