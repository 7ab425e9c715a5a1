"""What shares a key and what must not."""

from dataclasses import replace

import pytest

from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.engine.prefix_keys import PrefixKeys

ROUTE_BLOCK = 8
KEYS = PrefixKeys("router", ROUTE_BLOCK)
REQUEST = GenerationRequest("r", "acme", tuple(range(20)), 4, SamplingParams(5))


@pytest.mark.parametrize(("num_prompt", "num_keys"), [(1, 0), (7, 0), (8, 1), (15, 1), (16, 2), (257, 32)])
def test_only_full_blocks_have_a_key(num_prompt: int, num_keys: int) -> None:
    keys = KEYS.of(replace(REQUEST, prompt_tokens=(7,) * num_prompt))
    assert len(keys) == num_keys
    assert len(set(keys)) == num_keys, "equal tokens at another place are another block"


def test_prompts_share_the_keys_of_the_blocks_they_begin_with() -> None:
    longer = replace(REQUEST, request_id="other", prompt_tokens=(*range(20), *range(20)), sampling=SamplingParams(9))
    assert KEYS.of(longer)[:2] == KEYS.of(REQUEST)
    forked = replace(REQUEST, prompt_tokens=(*range(15), 99, 16))
    assert KEYS.of(forked)[0] == KEYS.of(REQUEST)[0]
    assert KEYS.of(forked)[1] != KEYS.of(REQUEST)[1]


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "hobby"},
        {"num_run_layers": 5},
        {"prompt_tokens": (1, *range(1, 20))},
        {"tenant": "acme', 4", "num_run_layers": 4},
    ],
)
def test_other_tenants_depths_and_beginnings_share_nothing(other: dict[str, object]) -> None:
    assert not set(KEYS.of(REQUEST)) & set(KEYS.of(replace(REQUEST, **other)))  # type: ignore[arg-type]


def test_other_routers_and_other_processes_share_nothing() -> None:
    for keys in (PrefixKeys("other", ROUTE_BLOCK), PrefixKeys("router", ROUTE_BLOCK)):
        assert not set(KEYS.of(REQUEST)) & set(keys.of(REQUEST))
