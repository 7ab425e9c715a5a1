"""The Budget Predictor in use: chooses the depth of prompts whose requests leave it open."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.features import causal_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.predictor import BudgetPredictor
from buddy_server.engine.messages import GenerationRequest

MOST_TOKENS = 16384
"""Prompt tokens that are predicted together."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DepthPredictor:
    """`cost_weight` as in BudgetPredictor.choose."""

    first_layer: FirstLayer
    predictor: BudgetPredictor
    cost_weight: float = 0.0

    def settle(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The requests in order; each that leaves its depth open gets the cost chosen for it. If the predictor fails,
        that is the highest cost it allows."""
        is_open = [request for request in requests if request.min_cost is not None]
        prompts = [request.prompt_tokens for request in is_open]
        bounds = [(request.min_cost or 0, request.max_cost) for request in is_open]
        try:
            chosen = iter(self.costs(prompts, bounds))
        except Exception:
            # A failed prediction should not fail the answer.
            log.exception("predicting depths failed")
            chosen = iter([highest for _, highest in bounds])
        return [
            request if request.min_cost is None else replace(request, max_cost=next(chosen), min_cost=None)
            for request in requests
        ]

    def costs(self, prompts: Sequence[tuple[int, ...]], bounds: Sequence[tuple[int, int]]) -> list[int]:
        """The milli-layers that a token of each prompt may cost, within its bounds (lowest, highest)."""
        chosen: list[int] = []
        for group in _in_groups(prompts):
            chosen += self._of_group(prompts[group], bounds[group])
        return chosen

    @torch.inference_mode()
    def _of_group(self, prompts: Sequence[tuple[int, ...]], bounds: Sequence[tuple[int, int]]) -> list[int]:
        """Runs all prompts through the first layer's V at once."""
        device = self.first_layer.device
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        of_prompts = self.first_layer.v(tokens).split([len(prompt) for prompt in prompts])  # [T, Hkv, Dh] each
        features = torch.cat([causal_features(v[None])[:, -1] for v in of_prompts])  # [S, 2F]
        lowest = torch.tensor([-(-cost // MILLI_LAYERS) for cost, _ in bounds], device=device)
        highest = torch.tensor([cost // MILLI_LAYERS for _, cost in bounds], device=device)
        layers = self.predictor.choose(features, lowest, highest, self.cost_weight)
        return [MILLI_LAYERS * count for count in layers.tolist()]


def _in_groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[slice]:
    """Splits prompts, in order, into groups of at most MOST_TOKENS tokens; a longer prompt is a group by itself."""
    start = num_tokens = 0
    for index, prompt in enumerate(prompts):
        num_tokens += len(prompt)
        if index > start and num_tokens > MOST_TOKENS:
            yield slice(start, index)
            start, num_tokens = index, len(prompt)
    if prompts:
        yield slice(start, len(prompts))
