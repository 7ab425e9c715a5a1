"""Chooses from its prompt how deep to run a request that names no budget.

The paper learns a policy over depths from rewards (arXiv 2606.09514, section 3.5). This predictor learns what quality
to expect of an answer at every depth, so that the exchange of quality for compute can be set when serving.
"""

# S prompts, K depths, F width of one token's V

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from buddy_routing.router import DecisionModule


class BudgetPredictor(nn.Module):
    """Estimates the quality of an answer at each of `depths`: milli-layers of a token in rising order, the last one
    full depth (ActionSpace.depths). Quality 1 is a right answer, 0 a wrong one."""

    depths: Tensor  # [K] int64
    cost_weight: Tensor  # []

    def __init__(self, num_features: int, depths: Sequence[int], rank: int = 32, cost_weight: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("depths", torch.tensor(depths))
        self.register_buffer("cost_weight", torch.tensor(cost_weight))
        self.estimator = DecisionModule(num_features, len(depths), rank)

    def quality(self, features: Tensor) -> Tensor:
        """Features [S, 2F] at the prompts' last tokens -> the quality to expect [S, K]."""
        expected: Tensor = self.estimator(features)
        return expected

    @torch.inference_mode()
    def choose(self, features: Tensor, lowest: Tensor | int, highest: Tensor | int, cost_weight: float = 0.0) -> Tensor:
        """Milli-layers that a token of each prompt may cost, [S] int64: of the depths between `lowest` and `highest`,
        each [S] or one for all, the one with the most quality after its cost.

        Full depth costs the predictor's own `cost_weight` plus the one given, in quality; less depth in proportion.
        If none of the depths is allowed, the result is `highest`.
        """
        least, most = (
            torch.as_tensor(bound, device=self.depths.device).expand(len(features)) for bound in (lowest, highest)
        )
        allowed = (self.depths >= least[:, None]) & (self.depths <= most[:, None])  # [S, K]
        cost = (self.cost_weight + cost_weight) * self.depths / self.depths[-1]
        worth = (self.quality(features) - cost).masked_fill(~allowed, -torch.inf)
        return torch.where(allowed.any(-1), self.depths[worth.argmax(-1)], most)
