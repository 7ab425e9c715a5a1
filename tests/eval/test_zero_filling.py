"""The zero-filling ablation changes what skipped layers leave behind, and nothing once it is over."""

from buddy_routing.stepper import TorchStepper
from buddy_server.engine.build import BuiltEngine
from buddy_server.eval.zero_filling import zero_filled
from tiny_engine import NUM_LAYERS, TinySite, build_tiny_engine, make_request, run_engine


def num_filled_slots(built: BuiltEngine) -> list[int]:
    """By layer: how many slots of the cache hold anything."""
    stepper = built.engine.runner.stepper
    assert isinstance(stepper, TorchStepper)
    k = stepper.cache.k
    return [int((layer.flatten(0, -3).flatten(1).abs().sum(1) > 0).sum()) for layer in k]


def test_skipped_layers_leave_zeros_and_the_model_is_itself_again_afterwards(tiny: TinySite) -> None:
    request = make_request(num_prompt=20, num_run=3, temperature=0)
    usual, ablated = (build_tiny_engine(tiny.model, tiny.router, prefix_cache=False) for _ in range(2))
    before = run_engine(usual.engine, [request]).answers["r"]
    with zero_filled(ablated):
        filled = run_engine(ablated.engine, [request]).answers["r"]
    assert len(set(num_filled_slots(usual))) == 1
    counts = num_filled_slots(ablated)
    assert counts[0] == counts[-1] == num_filled_slots(usual)[0]
    assert sum(counts[1:-1]) == counts[0]  # one layer in the middle for each token
    assert filled.tokens != before.tokens
    assert run_engine(ablated.engine, [request]).answers["r"].tokens == before.tokens


def test_full_depth_has_nothing_to_fill(tiny: TinySite) -> None:
    built = build_tiny_engine(tiny.model, tiny.router, prefix_cache=False)
    request = make_request(num_prompt=20, num_run=NUM_LAYERS, temperature=0)
    before = run_engine(built.engine, [request]).answers["r"]
    with zero_filled(built):
        assert run_engine(built.engine, [request]).answers["r"].tokens == before.tokens
