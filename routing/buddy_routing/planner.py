"""Keeps what routing remembers between steps and asks the router for a step's paths."""

# N rows, S segments, Hkv key/value heads, Dh head dim, F = Hkv x Dh, L layers

from array import array
from typing import Protocol

import torch
from torch import Tensor

from buddy_routing.features import RunningFeatures
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import Router
from buddy_routing.segments import SegmentBatch


class Planner(Protocol):
    """What the runner asks for a step's paths."""

    router: Router

    def start(self, lane: int, sums: "array[float] | None" = None) -> None: ...

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]: ...


class PathPlanner:
    """Running features and the last path of every lane."""

    def __init__(self, router: Router, spec: ModelSpec, num_lanes: int, device: torch.device) -> None:
        self.router = router
        self.features = RunningFeatures(num_lanes, spec.kv_dim, device)
        self.last_masks = torch.ones(num_lanes, spec.num_layers, dtype=torch.int8)

    def start(self, lane: int, sums: "array[float] | None" = None) -> None:
        """A sequence begins in the lane: at position 0, or within its prompt where its running features are `sums` [F],
        as `choose` told them."""
        self.features.reset(lane, sums)

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [S, L] int8 on the CPU, from the first layer's V states [N, Hkv, Dh] of the step's rows; and the
        running features' sums [S, F] fp64 after each segment."""
        features, sums = self.features.update(batch, v)
        num_run = torch.tensor(batch.budgets, device=features.device)
        masks = self.router.choose(features, num_run).cpu()
        for segment, lane in enumerate(batch.lanes):
            if not batch.reroutes[segment]:
                masks[segment] = self.last_masks[lane]
            self.last_masks[lane] = masks[segment]
        return masks, sums
