"""Routers: sources of paths that score each layer's current importance. The engine runs the layers that score best."""

# S segments, K rankings, C free layers, F width of one token's V

from typing import Protocol

import torch
from torch import Tensor, nn

from buddy_kernels import linear, silu

NEVER = 2**31
"""Value of `reroute_every` with which an answer keeps the path chosen at its prompt's end."""
FIXED = 0
"""Value of `reroute_every` with which a sequence has its path from the start, and no step chooses."""


class Router(Protocol):
    """Scores the layers for every segment. `router_id` names the router in logs, metrics and cache keys."""

    @property
    def router_id(self) -> str: ...

    @property
    def reroute_every(self) -> int:
        """Decode tokens per choice of path; 1 chooses at every token."""
        ...

    def scores(self, features: Tensor) -> Tensor:
        """features [S, 2F] fp32 -> scores [S, C] fp32 of the free layers."""
        ...


class DecisionModule(nn.Module):
    """Linear-SiLU-Linear from features to scores, C of them: for a router one for each action of a free layer besides
    skipping it (arXiv 2606.09514, section 3)."""

    def __init__(self, num_features: int, num_scores: int, rank: int = 32) -> None:
        super().__init__()
        self.down = nn.Linear(num_features, rank)
        self.up = nn.Linear(rank, num_scores)

    def forward(self, features: Tensor) -> Tensor:
        """[..., num_features] -> [..., C]."""
        rows = features.reshape(-1, features.shape[-1])
        hidden = silu(linear(rows, self.down.weight, self.down.bias))
        return linear(hidden, self.up.weight, self.up.bias).view(*features.shape[:-1], -1)


class LearnedRouter(nn.Module):
    """The Decision Module's scores plus a weighted static prior: s' = s + w * p, then top-k."""

    prior: Tensor

    def __init__(
        self,
        decision: DecisionModule,
        prior: Tensor,
        prior_weight: float,
        router_id: str,
        reroute_every: int = 1,
    ) -> None:
        super().__init__()
        self.decision = decision
        self.register_buffer("prior", prior.float())  # [C]
        self.prior_weight = prior_weight
        self.router_id = router_id
        self.reroute_every = reroute_every

    def scores(self, features: Tensor) -> Tensor:
        """[..., 2F] -> [..., C]. A Decision Module trained on the pooled V alone gets the first half."""
        fused: Tensor = self.decision(features[..., : self.decision.down.in_features]) + self.prior_weight * self.prior
        return fused


class StaticRouter:
    """One ranking of the layers for every token, whatever the input: a prior of [C] importances."""

    reroute_every = 1

    def __init__(self, prior: Tensor, router_id: str) -> None:
        self.prior = prior
        self.router_id = router_id

    def scores(self, features: Tensor) -> Tensor:
        return self.prior.to(features.device, torch.float32).expand(len(features), -1)


class PromptSetRouter:
    """One of a few rankings per prompt, chosen by a linear classifier and kept for the answer."""

    reroute_every = NEVER

    def __init__(self, rankings: Tensor, weight: Tensor, bias: Tensor, router_id: str) -> None:
        self.rankings = rankings  # [K, C]
        self.weight = weight  # [K, 2F]
        self.bias = bias  # [K]
        self.router_id = router_id

    def scores(self, features: Tensor) -> Tensor:
        return self.rankings[linear(features, self.weight, self.bias).argmax(-1)]
