"""Static importance of every free layer, measured on a text: a baseline router, and the learned router's prior.

Indicators and the four normalisation steps follow arXiv 2606.09514, section 3.3. The paper's Eq. 2 z-scores the result
again by mean and standard deviation; we stop at the ranks, which need no further scaling.
"""

# B sequences, T tokens, C free layers

import math
from collections.abc import Callable
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_kernels import rotary_cos_sin
from buddy_routing.decoder import RoutedDecoder, visible_keys
from buddy_routing.router_config import INDICATORS, Indicator

CLIP = 3.0
EPS = 1e-6


def bundled_text() -> str:
    """The small text in the package for measuring a prior at start."""
    return resources.files("buddy_routing").joinpath("calibration.txt").read_text(encoding="utf-8")


def normalise(importance: Tensor, log_scale: bool) -> Tensor:
    """Turns raw importances [C], larger is more important, into ranks in (0, 1): the paper's steps 2, 3 and 4.

    `log_scale` applies log(1 + x) first (for perplexity drops, not for cosine). Ties keep the lower index first, so
    that the ranks are reproducible.
    """
    if not len(importance):
        return importance.float()
    x = torch.log1p(importance) if log_scale else importance
    low, middle, high = torch.quantile(x.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    robust = ((x.double() - middle) / (high - low + EPS)).clamp(-CLIP, CLIP)
    order = torch.sort(robust, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order) - 1, -1, -1)
    return ((1 + rank).double() / (len(order) + 1)).float()


def measure_prior(model: RoutedDecoder, tokens: Tensor, indicator: Indicator, counted: Tensor | None = None) -> Tensor:
    """The normalised prior [C] of `model` on tokens [B, T].

    `counted` [B, T] bool marks the tokens whose successors the model was trained to predict; without it, all count.
    "cosine" is ShortGPT's block influence, "ppl" Shortened Llama's perplexity drop, "taylor" its first-order estimate,
    "greedy" SLEB's order of removal. Raises ValueError for an unknown indicator.
    """
    match indicator:
        case "cosine":
            return normalise(cosine_importance(model, tokens, counted), log_scale=False)
        case "ppl":
            return normalise(perplexity_drop(model, tokens, counted), log_scale=True)
        case "taylor":
            return normalise(taylor_importance(model, tokens, counted), log_scale=True)
        case "greedy":
            return normalise(removal_order(model, tokens, counted), log_scale=False)
    raise ValueError(f"prior {indicator!r} is unknown; allowed: {', '.join(INDICATORS)}")


@torch.inference_mode()
def cosine_importance(model: RoutedDecoder, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """1 - cos(input, output) of every free layer, averaged over tokens (ShortGPT's block influence): [C]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0])
    cos, sin = rotary_cos_sin(positions, model.inv_freq, model.attention_factor)
    h = model.embed_tokens(tokens)
    importance = []
    for layer in model.blocks:
        (ran,), _ = layer.dense(h, cos, sin, visible_keys(tokens.shape[1], layer.self_attn.window, None, tokens.device))
        similarity = F.cosine_similarity(h.float(), ran.float(), dim=-1)  # [B, T]
        importance.append(1 - (similarity if counted is None else similarity[counted]).mean().item())
        h = ran
    return torch.tensor(importance)[model.spec.actions.free]


@torch.inference_mode()
def perplexity_drop(model: RoutedDecoder, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """max(0, perplexity without the layer - perplexity with all layers), for every free layer: [C]."""
    num_layers = model.spec.num_layers
    full = _perplexity(model, tokens, counted, [True] * num_layers)
    drops = []
    for removed in model.spec.actions.free:
        without = _perplexity(model, tokens, counted, _without([True] * num_layers, removed))
        drops.append(max(0.0, without - full))
    return torch.tensor(drops)


@torch.inference_mode()
def removal_order(model: RoutedDecoder, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """The turn in which greedy removal drops each free layer, least important first (SLEB, arXiv 2402.09025): [C]."""
    layers_on = [True] * model.spec.num_layers
    free = model.spec.actions.free
    order = torch.zeros(len(free))
    for turn in range(len(free)):
        left = [layer for layer in free if layers_on[layer]]
        without = {layer: _perplexity(model, tokens, counted, _without(layers_on, layer)) for layer in left}
        removed = min(left, key=lambda layer: without[layer])
        layers_on[removed] = False
        order[free.index(removed)] = turn
    return order


def taylor_importance(model: RoutedDecoder, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum of |gradient x weight| over every free layer's matrices (Shortened Llama, arXiv 2402.02834): [C]."""
    importance = torch.zeros(model.spec.num_layers)
    was_trained = [parameter.requires_grad for parameter in model.parameters()]
    matrices = [(index, p) for index, layer in enumerate(model.blocks) for p in layer.parameters() if p.ndim == 2]
    handles = [
        matrix.requires_grad_(True).register_post_accumulate_grad_hook(_adder(importance, index))
        for index, matrix in matrices
    ]
    try:
        _next_token_nats(model, tokens, counted).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained in zip(model.parameters(), was_trained, strict=True):
            parameter.requires_grad_(trained)
    return importance[model.spec.actions.free]


def _adder(importance: Tensor, index: int) -> Callable[[Tensor], None]:
    """A hook that uses and frees each gradient as it appears: a model's gradients are never in memory all at once."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        importance[index] += (parameter.grad.float() * parameter.detach().float()).abs().sum().cpu()
        parameter.grad = None

    return add


def _without(layers_on: list[bool], removed: int) -> list[bool]:
    return [on and layer != removed for layer, on in enumerate(layers_on)]


def _perplexity(model: RoutedDecoder, tokens: Tensor, counted: Tensor | None, layers_on: list[bool]) -> float:
    return math.exp(_next_token_nats(model, tokens, counted, layers_on).item())


def _next_token_nats(
    model: RoutedDecoder, tokens: Tensor, counted: Tensor | None, layers_on: list[bool] | None = None
) -> Tensor:
    """Mean cross-entropy of the tokens that follow the counted ones."""
    hidden, following = model.dense(tokens[:, :-1], layers_on=layers_on), tokens[:, 1:]
    if counted is None:
        hidden, following = hidden.flatten(0, 1), following.flatten()
    else:
        hidden, following = hidden[counted[:, :-1]], following[counted[:, :-1]]
    return F.cross_entropy(model.lm_head(hidden).float(), following)
