"""Keeps the routing state between steps and gets a step's paths from the router."""

# N rows, A rows ahead, S segments, Hkv key/value heads, Dh head dim, F = Hkv x Dh, L layers

from array import array
from typing import Protocol

import torch
from torch import Tensor

from buddy_kernels import PathAction
from buddy_routing.features import RunningFeatures
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import Router
from buddy_routing.segments import SegmentBatch
from buddy_routing.selection import select_path


class Planner(Protocol):
    """The stepper's source of paths."""

    router: Router

    def start(self, lane: int, sums: "array[float] | None" = None) -> None: ...

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]: ...


class PathPlanner:
    """Keeps the running features and the last path of every lane."""

    def __init__(self, router: Router, spec: ModelSpec, num_lanes: int, device: torch.device) -> None:
        self.router = router
        self.features = RunningFeatures(num_lanes, spec.kv_dim, device)
        self.actions = spec.actions
        self.last_paths = torch.ones(num_lanes, spec.num_layers, dtype=torch.int8)

    def start(self, lane: int, sums: "array[float] | None" = None) -> None:
        """Start a sequence in the lane: at position 0, or inside its prompt, where its running features are `sums` [F],
        as returned by `choose`."""
        self.features.reset(lane, sums)

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the paths [S, L] int8 on the CPU, from the first layer's V states [N + A, Hkv, Dh] of the step's rows
        and those ahead; and the running features' sums [S, F] fp64 after each segment."""
        features, sums = self.features.update(batch, v)
        scores = self.router.scores(features)
        together = torch.zeros_like(scores).index_add_(0, torch.tensor(batch.aligned, device=scores.device), scores)
        max_costs = torch.tensor(batch.max_costs, device=scores.device)
        paths = select_path(together, max_costs, self.actions)[list(batch.aligned)].cpu()
        for segment, lane in enumerate(batch.lanes):
            if batch.path_actions[segment] != PathAction.CHOOSE:
                paths[segment] = self.last_paths[lane]
            self.last_paths[lane] = paths[segment]
        return paths, sums
