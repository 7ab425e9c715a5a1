"""Chooses a replica for each request: by the prefixes that replicas have computed, and by what they have to run.

Costs are in milli-layers. A replica is known by anything that can be a key.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from buddy_server.engine.messages import GenerationRequest
from buddy_server.engine.prefix_keys import PrefixKeys

BLOCK = 128
"""Prefixes are known in blocks of this many tokens, as engines keep them."""
MOST_PREFIXES = 65536
"""Blocks whose homes are remembered."""
OVERLOAD = 2
"""A home is chosen unless it would then have more than this many times as much to run as another replica."""
FEW = 4
"""Up to so many requests run side by side at little more than the cost of one, and are no overload."""


class Placement:
    """A request goes to the replica that has computed most of its prompt, its home, as long as that has few requests,
    or is not overloaded in comparison with another one, drawn at random. The home of a prompt that is new here is the
    one that its first block draws among all replicas (rendezvous hashing), the same in every process. A prompt of less
    than a block goes to the less loaded of two replicas drawn at random (Mitzenmacher, The Power of Two Choices in
    Randomized Load Balancing).

    The load of a replica is what its requests may cost, counted whole until they end. Only those placed here count.
    """

    def __init__(self) -> None:
        # Where a prompt goes is no secret; what a replica has computed is found by keys of its own.
        self._keys = PrefixKeys("", BLOCK, salt=b"")
        self._homes = PrefixHomes()
        self._loads = Loads()

    def place(self, request: GenerationRequest, replicas: Sequence[Hashable]) -> Hashable:
        """The replica for `request`, which is one more of its requests from now on."""
        chosen = self._choose(request, replicas)
        self.assign(request, chosen)
        return chosen

    def assign(self, request: GenerationRequest, replica: Hashable) -> None:
        """`request` goes to `replica`, wherever it should have gone."""
        keys = self._keys_of(request)
        num_cached, _ = self._homes.find(keys, [replica])
        self._loads.assign(request.request_id, replica, _cost(request, num_cached))
        self._homes.add(keys, replica)

    def release(self, request_id: str) -> None:
        """The request has ended, or never came to its replica."""
        self._loads.release(request_id)

    def replica_of(self, request_id: str) -> Hashable | None:
        """Where a request that has not ended is; None if it is unknown."""
        return self._loads.replica_of(request_id)

    def has_requests(self, replica: Hashable) -> bool:
        """Whether any of its requests has not ended."""
        return self._loads.num_of(replica) > 0

    def by_load(self, replicas: Collection[Hashable]) -> list[Hashable]:
        """`replicas`, the least loaded first."""
        return sorted(replicas, key=self._loads.of)

    def keep(self, replicas: Collection[Hashable]) -> None:
        """All other replicas are gone, and what they had computed."""
        self._homes.keep(replicas)

    def _choose(self, request: GenerationRequest, replicas: Sequence[Hashable]) -> Hashable:
        keys = self._keys_of(request)
        if not keys:
            return self.by_load(random.sample(replicas, min(2, len(replicas))))[0]
        num_cached, homes = self._homes.find(keys, replicas)
        homes = homes or {max(replicas, key=lambda replica: _digest(keys[0], replica))}
        others = [replica for replica in replicas if replica not in homes]
        home = self.by_load(homes)[0]
        if not others:
            return home
        other = random.choice(others)
        with_it = self._loads.of(home) + _cost(request, num_cached)
        is_overloaded = with_it > OVERLOAD * (self._loads.of(other) + _cost(request, 0))
        return other if is_overloaded and self._loads.num_of(home) >= FEW else home

    def _keys_of(self, request: GenerationRequest) -> tuple[bytes, ...]:
        # A depth that is still to be predicted is the same for equal prompts.
        return self._keys.of(request, request.max_cost)


class PrefixHomes:
    """The replicas that have computed a prefix, by the key of its last block (engine/prefix_keys.py). Whether it is
    still in their cache is not known here; what was used last is the likeliest to be."""

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, set[Hashable]] = OrderedDict()

    def find(self, keys: Sequence[bytes], replicas: Collection[Hashable]) -> tuple[int, set[Hashable]]:
        """How many tokens of a prompt with these keys any of `replicas` has computed, and which of them have."""
        for num_blocks in range(len(keys), 0, -1):
            homes = self._homes.get(keys[num_blocks - 1], set()) & set(replicas)
            if homes:
                return num_blocks * BLOCK, homes
        return 0, set()

    def add(self, keys: Sequence[bytes], replica: Hashable) -> None:
        for key in keys:
            self._homes.setdefault(key, set()).add(replica)
            self._homes.move_to_end(key)
        while len(self._homes) > MOST_PREFIXES:
            self._homes.popitem(last=False)

    def keep(self, replicas: Collection[Hashable]) -> None:
        left = set(replicas)
        self._homes = OrderedDict((key, homes & left) for key, homes in self._homes.items() if homes & left)


@dataclass(frozen=True, slots=True)
class _Assigned:
    replica: Hashable
    cost: int


class Loads:
    """What the open requests of each replica may cost."""

    def __init__(self) -> None:
        self._assigned: dict[str, _Assigned] = {}
        self._costs: Counter[Hashable] = Counter()
        self._nums: Counter[Hashable] = Counter()

    def assign(self, name: str, replica: Hashable, cost: int) -> None:
        """The request `name` is the replica's, and no other's any more."""
        self.release(name)
        self._assigned[name] = _Assigned(replica, cost)
        self._costs[replica] += cost
        self._nums[replica] += 1

    def release(self, name: str) -> None:
        if (assigned := self._assigned.pop(name, None)) is not None:
            self._costs[assigned.replica] -= assigned.cost
            self._nums[assigned.replica] -= 1
            if not self._nums[assigned.replica]:
                del self._costs[assigned.replica], self._nums[assigned.replica]

    def replica_of(self, name: str) -> Hashable | None:
        assigned = self._assigned.get(name)
        return None if assigned is None else assigned.replica

    def of(self, replica: Hashable) -> int:
        return self._costs[replica]

    def num_of(self, replica: Hashable) -> int:
        return self._nums[replica]


def _digest(key: bytes, replica: Hashable) -> bytes:
    return blake2b(str(replica).encode(), key=key).digest()


def _cost(request: GenerationRequest, num_cached: int) -> int:
    return (len(request.prompt_tokens) - num_cached + request.sampling.max_tokens) * request.max_cost
