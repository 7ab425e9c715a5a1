"""Duo-LLM's small FFNs (arXiv 2410.10846): a layer may run with one in place of the big FFN, at a part of its cost."""

from collections.abc import Mapping

import torch
from torch import Tensor

from buddy_routing.decoder import MLP, RoutedDecoder
from buddy_routing.router import DecisionModule, LearnedRouter


class DuoRouter(LearnedRouter):
    """A learned router with a score for running each free layer, and one for running it with its small FFN."""

    def __init__(
        self, decision: DecisionModule, small_ffns: Mapping[int, MLP], router_id: str, reroute_every: int = 1
    ) -> None:
        super().__init__(decision, torch.zeros(decision.up.out_features), 0.0, router_id, reroute_every)
        # By layer. Not a submodule: the small FFNs are the model's part, not the router's.
        self.small_ffns = dict(small_ffns)


def new_small_ffns(model: RoutedDecoder, divisor: int) -> dict[int, MLP]:
    """Untrained small FFNs in fp32, a `divisor`-th as wide as the big one, for all layers but the first and the last.

    Each starts as a part of its big one: the units with the largest weights.

    Raises ValueError for a divisor that leaves no unit, or all.
    """
    spec = model.spec
    if not 1 < divisor <= spec.intermediate_size:
        raise ValueError(f"small FFNs of 1/{divisor} are not allowed: give 2 to {spec.intermediate_size}")
    if spec.num_layers < 3:
        raise ValueError("a model of 2 layers has none that could have a small FFN")
    size = spec.intermediate_size // divisor
    return {layer: _part_of(model.blocks[layer].mlp, size, model) for layer in range(1, spec.num_layers - 1)}


def _part_of(big: MLP, size: int, model: RoutedDecoder) -> MLP:
    small = MLP(model.spec, size).to(model.inv_freq.device)
    weights = (big.gate_proj.weight, big.up_proj.weight, big.down_proj.weight.T)  # [M, D] each
    units = torch.stack([weight.detach().float().norm(dim=1) for weight in weights]).prod(0).topk(size).indices
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(_units_of(big.get_parameter(name), units, name))
    return small


def _units_of(parameter: Tensor, units: Tensor, name: str) -> Tensor:
    if name == "down_proj.bias":
        return parameter
    return parameter[:, units] if name == "down_proj.weight" else parameter[units]
