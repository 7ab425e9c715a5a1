"""The static prior: its normalisation by hand, its indicators on a layer known to do nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.prior import (
    bundled_text,
    cosine_importance,
    measure_prior,
    normalise,
    perplexity_drop,
)
from buddy_routing.router_config import INDICATORS, Indicator
from tiny_models import SHAPE, save_random_model

NUM_MIDDLE = SHAPE["num_hidden_layers"] - 2


@pytest.fixture
def model(tmp_path: Path) -> RoutedDecoder:
    save_random_model("llama", tmp_path)
    return load_model(tmp_path, torch.float32, torch.device("cpu")).model


def own_text(model: RoutedDecoder, num_tokens: int = 60) -> Tensor:
    """What the model itself says, so that taking a layer away makes it worse: [1, T]."""
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model.lm_head(model.dense(tokens))
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens


def test_importances_become_ranks_in_the_open_unit_interval() -> None:
    """Robust z-score and clipping keep the order; the rank r of n becomes (1 + r) / (n + 1)."""
    got = normalise(torch.tensor([0.3, 0.1, 0.9, 0.2]), log_scale=False)
    torch.testing.assert_close(got, torch.tensor([3 / 5, 1 / 5, 4 / 5, 2 / 5]))


def test_outliers_beyond_the_clip_are_equal_and_the_lower_index_ranks_higher() -> None:
    # Quartiles 1, 2, 3: 8 and above are clipped at 3 interquartile ranges from the median.
    raw = torch.tensor([1.0, 2.0, 3.0, 100.0, 9.0, 1.0, 2.0, 2.0, 1.0])
    low, middle, high = raw.quantile(0.25), raw.median(), raw.quantile(0.75)
    assert (low, middle, high) == (1.0, 2.0, 3.0)
    got = normalise(raw, log_scale=False)
    # 100 and 9 both clip to 3; then 3; then the three 2s; then the three 1s, each group by index.
    ranks = [2, 5, 6, 8, 7, 1, 4, 3, 0]
    torch.testing.assert_close(got, torch.tensor([(1 + rank) / 10 for rank in ranks]))


def test_log_scale_draws_outliers_in_before_the_clip() -> None:
    raw = torch.tensor([0.0, 1.0, 3.0, 7.0, 8.0, 40.0])
    # log(1 + x) = 0, .69, 1.39, 2.08, 2.20, 3.71: within 3 interquartile ranges, nothing is clipped.
    torch.testing.assert_close(normalise(raw, log_scale=True), torch.arange(1, 7) / 7)
    spread = torch.tensor([0.0, 0.1, 0.2, 0.3, 80.0, 90.0, 0.15, 0.25, 0.05])
    assert normalise(spread, log_scale=False)[4] > normalise(spread, log_scale=False)[5], "clipped: a tie"


def test_equal_importances_rank_by_index() -> None:
    torch.testing.assert_close(normalise(torch.ones(4), log_scale=True), torch.tensor([0.8, 0.6, 0.4, 0.2]))


@pytest.mark.parametrize("indicator", INDICATORS)
@pytest.mark.parametrize("useless", range(1, NUM_MIDDLE + 1))
def test_layer_that_does_nothing_is_the_least_important(
    model: RoutedDecoder, indicator: Indicator, useless: int
) -> None:
    layer = model.blocks[useless]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    prior = measure_prior(model, own_text(model), indicator)
    assert sorted(prior.tolist()) == pytest.approx([rank / (NUM_MIDDLE + 1) for rank in range(1, NUM_MIDDLE + 1)])
    assert int(prior.argmin()) == useless - 1


def test_indicators_of_a_useless_layer_are_zero_and_of_others_are_not(model: RoutedDecoder) -> None:
    model.blocks[2].self_attn.o_proj.weight.zero_()
    model.blocks[2].mlp.down_proj.weight.zero_()
    tokens = own_text(model)
    for importance in (cosine_importance(model, tokens), perplexity_drop(model, tokens)):
        assert importance.shape == (NUM_MIDDLE,)
        assert importance[1].item() == pytest.approx(0, abs=1e-6)
        assert (importance[[0, 2, 3]] > 1e-3).all()


def test_unknown_indicator_is_refused_by_name(model: RoutedDecoder) -> None:
    with pytest.raises(ValueError, match="prior 'magic' is unknown; allowed: cosine, ppl"):
        measure_prior(model, own_text(model, 2), "magic")  # type: ignore[arg-type]


def test_text_to_measure_on_ships_with_the_package() -> None:
    assert len(bundled_text()) > 500


@pytest.mark.parametrize("num_middle", [0, 1])
def test_models_with_nothing_to_rank_have_a_prior_too(num_middle: int) -> None:
    assert normalise(torch.ones(num_middle), log_scale=False).tolist() == [0.5] * num_middle
