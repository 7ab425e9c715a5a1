"""Chooses how deep to run a request that names no budget, from its prompt (arXiv 2606.09514, section 3.5)."""

# S prompts, L layers, F width of one token's V

import torch
from torch import Tensor, nn

from buddy_routing.budget import ALWAYS_RUN
from buddy_routing.router import DecisionModule


class BudgetPredictor(nn.Module):
    """A categorical policy over how many of the middle layers to run: 1 .. L - 2, so 3 .. L layers in all. It was
    trained on `lowest` layers and more."""

    lowest: Tensor

    def __init__(self, num_features: int, num_layers: int, rank: int = 32, lowest: int = ALWAYS_RUN + 1) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(lowest))
        self.policy = DecisionModule(num_features, num_layers, rank)
        self.num_layers = num_layers

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Features [S, 2F] at the prompts' last tokens -> log pi [S, L - 2], -inf for what it was not trained on."""
        scores: Tensor = self.policy(features)
        return scores.masked_fill(self.levels < self.lowest, -torch.inf).log_softmax(-1)

    @property
    def levels(self) -> Tensor:
        """[L - 2] int64: the layers that each action runs."""
        return torch.arange(ALWAYS_RUN + 1, self.num_layers + 1, device=self.policy.up.bias.device)

    @torch.inference_mode()
    def choose(self, features: Tensor, lowest: int, highest: int, cost_weight: float = 0.0) -> Tensor:
        """Layers to run [S] int64: the likeliest level of those from `lowest` to `highest`.

        `cost_weight` trades quality for compute: it is what the log probability of full depth loses, and of less depth
        in proportion. Where none of its levels is allowed, `highest` is taken.
        """
        levels = self.levels
        allowed = (levels >= max(lowest, int(self.lowest))) & (levels <= highest)
        if not allowed.any():
            return torch.full((len(features),), highest, device=levels.device)
        scores = self.log_probabilities(features) - cost_weight * levels / self.num_layers
        return levels[scores.masked_fill(~allowed, -torch.inf).argmax(-1)]
