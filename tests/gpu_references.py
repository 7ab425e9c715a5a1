"""Runs the decode steps of buddy_kernels.gpu by the kernels' references, a thousand times faster than the interpreter:
for what is not about kernels."""

from functools import partial

import pytest

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
from buddy_routing.action_space import ActionSpace
from path_choice_reference import choose_paths_reference

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
    monkeypatch.setattr(decode_step, "choose_paths", partial(choose_paths_reference, actions))
