"""What buddy_kernels.gpu.path_choice computes, by the selection that it follows."""

import torch
from torch import Tensor

from buddy_kernels import RouterWeights
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.step import PathAction
from buddy_routing.action_space import ActionSpace
from buddy_routing.selection import select_path


def choose_paths_reference(
    space: ActionSpace,
    scores: Tensor,
    max_costs: Tensor,
    lanes: Tensor,
    path_actions: Tensor,
    aligned: Tensor,
    router: RouterWeights,
    live: RowList,
    paths: Tensor,
) -> None:
    """`choose_paths` of a model with these actions, in plain torch."""
    rows = live.listed()
    paths[rows] = router.last_paths[lanes[rows]]
    chooses = rows[path_actions[rows] == PathAction.CHOOSE]
    # Exits choose nothing.
    if len(chooses):
        together = torch.zeros_like(scores).index_add_(0, aligned[rows], scores[rows])
        leaders = aligned[chooses]
        paths[chooses] = select_path(together[leaders], max_costs[leaders], space)
    router.last_paths[lanes[rows]] = paths[rows]
