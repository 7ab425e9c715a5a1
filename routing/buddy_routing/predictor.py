"""Chooses from its prompt how deep to run a request that names no budget (arXiv 2606.09514, section 3.5)."""

# S prompts, L layers, C of them free, F width of one token's V

import torch
from torch import Tensor, nn

from buddy_routing.action_space import ActionSpace
from buddy_routing.router import DecisionModule


class BudgetPredictor(nn.Module):
    """A categorical policy over how many of the free layers to run: 1 to all. It was trained on `lowest` layers and
    more."""

    lowest: Tensor

    def __init__(self, num_features: int, num_layers: int, rank: int = 32, lowest: int = 0) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(lowest))
        self.num_layers = num_layers
        self._num_forced = len(ActionSpace.skip_or_run(num_layers).forced)
        self.policy = DecisionModule(num_features, num_layers - self._num_forced, rank)

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Features [S, 2F] at the prompts' last tokens -> log pi [S, C], -inf for levels it was not trained on."""
        scores: Tensor = self.policy(features)
        return scores.masked_fill(self.levels < self.lowest, -torch.inf).log_softmax(-1)

    @property
    def levels(self) -> Tensor:
        """[C] int64: the layers that each choice runs, including forced ones."""
        return torch.arange(self._num_forced + 1, self.num_layers + 1, device=self.lowest.device)

    @torch.inference_mode()
    def choose(self, features: Tensor, lowest: Tensor | int, highest: Tensor | int, cost_weight: float = 0.0) -> Tensor:
        """Layers to run [S] int64: the likeliest level between `lowest` and `highest`, each [S] or one for all.

        `cost_weight` trades quality for compute: it is subtracted from the log probability of full depth, and from that
        of less depth in proportion. If none of its levels is allowed, the result is `highest`.
        """
        levels = self.levels  # [C]
        least, most = (
            torch.as_tensor(bound, device=levels.device).expand(len(features)) for bound in (lowest, highest)
        )
        allowed = (levels >= least[:, None]) & (levels >= self.lowest) & (levels <= most[:, None])  # [S, C]
        scores = self.log_probabilities(features) - cost_weight * levels / self.num_layers
        likeliest = levels[scores.masked_fill(~allowed, -torch.inf).argmax(-1)]
        return torch.where(allowed.any(-1), likeliest, most)
