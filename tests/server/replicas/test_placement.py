"""Which replica a request goes to."""

import random
from dataclasses import replace
from typing import Any

import pytest

from buddy_server.engine.messages import GenerationRequest, SamplingParams
from buddy_server.replicas.placement import BLOCK, MOST_PREFIXES, Placement, PrefixHomes

REPLICAS = ["a", "b", "c", "d"]


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 100, max_cost: int = 4000) -> GenerationRequest:
    return GenerationRequest(name, "acme", prompt, max_cost, SamplingParams(max_tokens))


def prompt(seed: int, num_blocks: int = 16) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(1000) for _ in range(num_blocks * BLOCK))


@pytest.fixture
def placement() -> Placement:
    return Placement()


def test_second_request_goes_where_its_prefix_is(placement: Placement) -> None:
    homes = {seed: placement.place(request(f"{seed}", prompt(seed)), REPLICAS) for seed in range(40)}
    assert set(homes.values()) == set(REPLICAS)
    for seed in homes:
        placement.release(f"{seed}")
    for seed, home in homes.items():
        assert placement.place(request("again", (*prompt(seed), 1, 2, 3)), REPLICAS) == home


def test_longest_known_prefix_counts(placement: Placement) -> None:
    shared = prompt(0, 2)
    placement.assign(request("short", shared), "a")
    placement.assign(request("long", shared + prompt(1, 2)), "b")
    assert placement.place(request("longer", shared + prompt(1, 2) + prompt(2, 1)), REPLICAS) == "b"


@pytest.mark.parametrize("other", [{"tenant": "hobby"}, {"max_cost": 3900}])
def test_other_tenants_and_depths_find_nothing_computed(placement: Placement, other: dict[str, Any]) -> None:
    first = request("first", prompt(0))
    placement.assign(first, "a")
    placement.assign(replace(first, request_id="the same"), "a")
    placement.assign(replace(first, request_id="b's first"), "b")
    placement.assign(replace(first, request_id="another", **other), "b")
    assert placement.by_load(["b", "a"]) == ["a", "b"]


def test_home_that_is_overloaded_is_left_and_not_before(placement: Placement) -> None:
    """Each request costs 2048 + 100 tokens where its prompt is new, and 100 at its home."""
    placement.assign(request("first", prompt(0)), "a")
    placed = [placement.place(request(f"{n}", prompt(0)), ["a", "b"]) for n in range(40)]
    # At home: 2148 + 100 n, and no more than 2 * 2148.
    assert placed[:21] == ["a"] * 21
    assert placed[21] == "b"
    # Now both have it, and the less loaded one is chosen.
    assert placed.count("b") > 1


def test_home_with_few_requests_is_not_left(placement: Placement) -> None:
    """However much they cost: each has one block of its prompt there."""
    placement.assign(request("first", prompt(0)), "a")
    placed = [placement.place(request(f"{n}", prompt(0, 1) + prompt(n, 15)), ["a", "b"]) for n in range(1, 5)]
    assert placed == ["a", "a", "a", "b"]


def test_request_without_a_home_goes_to_the_less_loaded_of_two(placement: Placement) -> None:
    placement.assign(request("big", prompt(0), max_tokens=9000), "a")
    placed = [placement.place(request(f"{n}", (n,), max_tokens=1), ["a", "b"]) for n in range(50)]
    assert placed == ["b"] * 50


@pytest.mark.parametrize(("num_blocks", "most_apart"), [(0, 10), (1, 60)])
def test_requests_spread_evenly(placement: Placement, num_blocks: int, most_apart: int) -> None:
    random.seed(0)
    placed = [placement.place(request(f"{n}", prompt(n, num_blocks)), REPLICAS) for n in range(400)]
    assert max(map(placed.count, REPLICAS)) - min(map(placed.count, REPLICAS)) < most_apart


def test_another_process_finds_the_same_home() -> None:
    for seed in range(40):
        first, second = (Placement().place(request("r", (*prompt(seed), n)), REPLICAS) for n in (1, 2))
        assert first == second


def test_prompts_that_begin_alike_do_not_all_wait_at_one_home(placement: Placement) -> None:
    placed = [placement.place(request(f"{n}", prompt(0, 1) + prompt(n, 4)), REPLICAS) for n in range(40)]
    assert set(placed) == set(REPLICAS)


def test_load_is_counted_until_the_request_ends_wherever_it_went(placement: Placement) -> None:
    placement.assign(request("r", prompt(0)), "a")
    placement.assign(request("r", prompt(0)), "b")
    assert placement.replica_of("r") == "b"
    assert placement.by_load(["b", "a"]) == ["a", "b"]
    placement.release("r")
    placement.release("r")
    assert placement.replica_of("r") is None
    assert placement.by_load(["b", "a"]) == ["b", "a"]


def test_replica_that_is_gone_is_no_home(placement: Placement) -> None:
    placement.assign(request("r", prompt(0)), "a")
    placement.keep(["b", "c"])
    assert placement.place(request("s", prompt(0)), ["b", "c"]) in ("b", "c")
    placement.keep(["a", "b", "c"])
    placement.release("s")
    assert placement.place(request("t", prompt(0)), ["a", "b", "c"]) != "a"


def test_homes_of_the_prefixes_used_last_are_remembered() -> None:
    homes = PrefixHomes()
    homes.add([b"old"], "a")
    homes.add([b"used"], "a")
    homes.add([b"%d" % number for number in range(MOST_PREFIXES - 2)], "b")
    homes.add([b"used"], "a")
    homes.add([b"one more"], "b")
    assert homes.find([b"old"], ["a"]) == (0, set())
    assert homes.find([b"used"], ["a"]) == (BLOCK, {"a"})
