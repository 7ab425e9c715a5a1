"""Runs the decode steps of buddy_kernels.gpu by the kernels' references, a thousand times faster than the interpreter:
for what is not about kernels."""

import pytest
import torch
from torch import Tensor

from buddy_kernels import RouterWeights
from buddy_kernels.gpu import (
    attention,
    decode_step,
    logit_adjustment,
    path_router,
    row_linear,
    row_lists,
    row_norm,
    row_steps,
    token_draw,
)
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.step import PathAction
from buddy_routing.action_space import ActionSpace
from buddy_routing.selection import select_path

MODULES = {
    attention: ("attend",),
    logit_adjustment: ("adjust_logits",),
    path_router: ("score_layers",),
    row_linear: ("row_linear", "add_row_linear", "row_qkv", "row_swiglu"),
    row_lists: ("fill_layer_lists",),
    row_norm: ("norm_rows",),
    row_steps: ("begin_step", "end_step"),
    token_draw: ("draw_tokens",),
}


def use_references(monkeypatch: pytest.MonkeyPatch, actions: ActionSpace) -> None:
    """For models with these actions."""
    for module, names in MODULES.items():
        for name in names:
            monkeypatch.setattr(decode_step, name, getattr(module, f"{name}_reference"))

    def choose_paths(
        scores: Tensor,
        max_costs: Tensor,
        lanes: Tensor,
        path_actions: Tensor,
        aligned: Tensor,
        router: RouterWeights,
        live: RowList,
        paths: Tensor,
    ) -> None:
        rows = live.listed()
        paths[rows] = router.last_paths[lanes[rows]]
        chooses = rows[path_actions[rows] == PathAction.CHOOSE]
        # Exits choose nothing.
        if len(chooses):
            together = torch.zeros_like(scores).index_add_(0, aligned[rows], scores[rows])
            leaders = aligned[chooses]
            paths[chooses] = select_path(together[leaders], max_costs[leaders], actions)
        router.last_paths[lanes[rows]] = paths[rows]

    monkeypatch.setattr(decode_step, "choose_paths", choose_paths)
