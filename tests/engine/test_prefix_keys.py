"""What shares a key and what must not."""

from dataclasses import replace

import pytest

from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.prefix_keys import PrefixKeys

ROUTE_BLOCK = 8
KEYS = PrefixKeys("router", ROUTE_BLOCK)
REQUEST = GenerationRequest("r", "acme", tuple(range(20)), 4000, SamplingParams(5))


def keys_of(request: GenerationRequest, keys: PrefixKeys = KEYS) -> tuple[bytes, ...]:
    return keys.of(request, request.max_cost)


@pytest.mark.parametrize(("num_prompt", "num_keys"), [(1, 0), (7, 0), (8, 1), (15, 1), (16, 2), (257, 32)])
def test_only_full_blocks_have_a_key(num_prompt: int, num_keys: int) -> None:
    keys = keys_of(replace(REQUEST, prompt_tokens=(7,) * num_prompt))
    assert len(keys) == num_keys
    assert len(set(keys)) == num_keys, "equal tokens at another place are another block"


def test_prompts_share_the_keys_of_the_blocks_they_begin_with() -> None:
    longer = replace(REQUEST, request_id="other", prompt_tokens=(*range(20), *range(20)), sampling=SamplingParams(9))
    assert keys_of(longer)[:2] == keys_of(REQUEST)
    forked = replace(REQUEST, prompt_tokens=(*range(15), 99, 16))
    assert keys_of(forked)[0] == keys_of(REQUEST)[0]
    assert keys_of(forked)[1] != keys_of(REQUEST)[1]


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "hobby"},
        {"max_cost": 5000},
        {"prompt_tokens": (1, *range(1, 20))},
        {"tenant": "acme', 4000", "max_cost": 4000},
    ],
)
def test_other_tenants_depths_and_beginnings_share_nothing(other: dict[str, object]) -> None:
    assert not set(keys_of(REQUEST)) & set(keys_of(replace(REQUEST, **other)))  # type: ignore[arg-type]


def test_other_routers_and_other_processes_share_nothing() -> None:
    for keys in (PrefixKeys("other", ROUTE_BLOCK), PrefixKeys("router", ROUTE_BLOCK)):
        assert not set(keys_of(REQUEST)) & set(keys_of(REQUEST, keys))
