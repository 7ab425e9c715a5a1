"""An ablation: skipped layers leave zeros in the KV cache, as in the paper's implementation, not projected K/V."""

# N rows of a step, L layers

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from buddy_routing.action_space import SKIP
from buddy_routing.planner import Planner
from buddy_routing.segments import SegmentBatch
from buddy_routing.stepper import TorchStepper
from buddy_server.engine.build import BuiltEngine


class NotingPlanner:
    """A planner that keeps the paths of the step's rows."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.router = planner.router
        self.row_paths = torch.empty(0, 0)  # [N, L]

    def start(self, lane: int, max_cost: int, sums: "array[float] | None" = None) -> None:
        self._planner.start(lane, max_cost, sums)

    def choose(self, batch: SegmentBatch, v: Tensor) -> tuple[Tensor, Tensor]:
        paths, sums = self._planner.choose(batch, v)
        self.row_paths = paths[batch.segment_of_row.cpu()]
        return paths, sums


@contextmanager
def zero_filled(built: BuiltEngine) -> Iterator[None]:
    """Within this context, an engine that runs in plain torch writes zeros where a row skips a layer. It must have no
    prefix cache, which would keep them."""
    stepper = built.engine.runner.stepper
    assert isinstance(stepper, TorchStepper)
    planner = stepper.planner
    noting = NotingPlanner(planner)
    # The first layer always runs, and the paths are chosen from its V.
    handles = [
        projection.register_forward_hook(_emptied(noting, index))
        for index, layer in enumerate(stepper.model.blocks)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        if index > 0
    ]
    stepper.planner = noting
    try:
        yield
    finally:
        stepper.planner = planner
        for handle in handles:
            handle.remove()


def _emptied(noting: NotingPlanner, index: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
    # Rotation and normalisation keep zeros.
    return lambda _module, _inputs, output: output * (noting.row_paths[:, index : index + 1] != SKIP).to(output)
