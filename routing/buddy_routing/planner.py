"""Keeps the routing state between steps and gets a step's paths from the router."""

# N rows, A rows ahead, S segments, Hkv key/value heads, Dh head dim, F = Hkv x Dh, C columns of a path

from array import array
from typing import Protocol

import torch
from torch import Tensor

from buddy_kernels import PathAction
from buddy_routing.exits import ExitRouter
from buddy_routing.features import RunningFeatures
from buddy_routing.model_spec import ModelSpec
from buddy_routing.router import Router
from buddy_routing.segments import SegmentBatch
from buddy_routing.selection import select_path


class Planner(Protocol):
    """The stepper's source of paths."""

    router: Router | ExitRouter

    def start(self, lane: int, max_cost: int, sums: "array[float] | None" = None) -> None: ...

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]: ...


class PathPlanner:
    """Keeps the running features and the last path of every lane."""

    def __init__(self, router: Router | ExitRouter, spec: ModelSpec, num_lanes: int, device: torch.device) -> None:
        self.router = router
        self.features = RunningFeatures(num_lanes, spec.kv_dim, device)
        self.actions = spec.actions
        self.last_paths = torch.ones(num_lanes, spec.num_columns, dtype=torch.int8, device=device)

    def start(self, lane: int, max_cost: int, sums: "array[float] | None" = None) -> None:
        """Start a sequence in the lane whose next token may cost `max_cost` milli-layers: at position 0, or inside its
        prompt, where its running features are `sums` [F], as returned by `choose`."""
        self.features.reset(lane, sums)
        if isinstance(self.router, ExitRouter):
            path = bytearray(self.actions.exit_path(max_cost))
            self.last_paths[lane] = torch.frombuffer(path, dtype=torch.int8)

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the paths [S, C] int8 on the CPU, from the first layer's V states [N + A, Hkv, Dh] of the step's rows
        and those ahead; and the running features' sums [S, F] fp64 after each segment."""
        features, sums = self.features.update(batch, v)
        if isinstance(self.router, ExitRouter):
            return self.last_paths[list(batch.lanes)].cpu(), sums
        scores = self.router.scores(features)
        together = torch.zeros_like(scores).index_add_(0, torch.tensor(batch.aligned, device=scores.device), scores)
        max_costs = torch.tensor(batch.max_costs, device=scores.device)
        paths = select_path(together, max_costs, self.actions)[list(batch.aligned)].cpu()
        lanes = sorted(set(batch.lanes))
        last_paths = dict(zip(lanes, self.last_paths[lanes].cpu(), strict=True))
        for segment, lane in enumerate(batch.lanes):
            if batch.path_actions[segment] != PathAction.CHOOSE:
                paths[segment] = last_paths[lane]
            last_paths[lane] = paths[segment]
        self.last_paths[lanes] = torch.stack([last_paths[lane] for lane in lanes]).to(self.last_paths.device)
        return paths, sums
