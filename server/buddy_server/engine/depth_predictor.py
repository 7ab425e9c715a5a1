"""Runs the Budget Predictor: how deep to run prompts whose requests leave the depth open."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from buddy_routing.features import last_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.predictor import BudgetPredictor

MOST_TOKENS = 2048
"""Prompt tokens that go through the first layer in one product: a few milliseconds with a small model."""


@dataclass(frozen=True, slots=True)
class DepthPredictor:
    """`cost_weight` as in BudgetPredictor.choose."""

    first_layer: FirstLayer
    predictor: BudgetPredictor
    cost_weight: float = 0.0

    @torch.inference_mode()
    def costs(self, prompts: Sequence[tuple[int, ...]], bounds: Sequence[tuple[int, int]]) -> list[int]:
        """The milli-layers that a token of each prompt may cost, within its bounds: the lowest and the highest."""
        device = self.first_layer.device
        distinct = list(dict.fromkeys(prompts))
        features = {}
        for group in _in_groups(distinct):
            tokens = torch.tensor([token for prompt in group for token in prompt], device=device)
            of_prompts = self.first_layer.v(tokens).split([len(prompt) for prompt in group])  # [T, Hkv, Dh] each
            features.update({prompt: last_features(v) for prompt, v in zip(group, of_prompts, strict=True)})
        lowest, highest = torch.tensor(bounds, device=device).unbind(-1)
        rows = torch.stack([features[prompt] for prompt in prompts])  # [S, 2F]
        costs: list[int] = self.predictor.choose(rows, lowest, highest, self.cost_weight).tolist()
        return costs


def _in_groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Prompts in order, in groups of at most MOST_TOKENS tokens or of a single prompt."""
    start = num_tokens = 0
    for index, prompt in enumerate(prompts):
        num_tokens += len(prompt)
        if index > start and num_tokens > MOST_TOKENS:
            yield prompts[start:index]
            start, num_tokens = index, len(prompt)
    yield prompts[start:]
