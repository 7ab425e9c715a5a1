"""An upper bound on paths: the best path for each prompt, found by beam search on the true answer. Not a method.

The search sees the answer, which a router cannot; but it gives each prompt one path, and a router may change it at
every token. With small FFNs it is Duo-LLM's oracle (arXiv 2410.10846), by beam search instead of all paths.
"""

# E examples, W beam width, N children of a beam, L layers

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from buddy_routing.action_space import RUN, SKIP, SMALL, ActionSpace
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.train.answer_loss import answer_loss, fixed_paths
from buddy_routing.train.example import ExampleBatch

BEAM_WIDTH = 2


@dataclass(frozen=True, slots=True)
class FoundPaths:
    """Of the best path of each example: its cost in milli-layers, the nats of the answer, and whether the answer is
    exactly the reference."""

    costs: Tensor  # [E] int64
    nats: Tensor  # [E]
    is_right: Tensor  # [E] bool


def search_paths(model: RoutedDecoder, batch: ExampleBatch, max_costs: Sequence[int]) -> Mapping[int, FoundPaths]:
    """The path of the lowest loss that was tried for every example, among those that cost at most each of `max_costs`
    milli-layers.

    Each step makes one layer of every path in the beam cheaper: it gets its small FFN, if there are any, or is skipped.
    The `BEAM_WIDTH` paths of an example remain that lose least, or gain most, per milli-layer saved.
    """
    actions = model.spec.actions
    num_examples = int((batch.counted & ~batch.in_answer).sum())
    full = torch.full((num_examples, actions.num_layers), RUN, dtype=torch.int8, device=batch.tokens.device)
    nats_at_full = answer_loss(model, batch, fixed_paths(batch, full)).nats  # [E]
    beam = full[:, None]  # [E, W, L]
    best = {max_cost: full.clone() for max_cost in max_costs}
    lowest = {max_cost: torch.full_like(nats_at_full, torch.inf) for max_cost in max_costs}
    with tqdm(total=actions.full_cost - min(max_costs), desc="search bound", unit="milli-layer") as bar:
        while (most := int(path_costs(beam, actions).max())) > min(max_costs):
            bar.update(actions.full_cost - most - bar.n)
            children = torch.cat([_one_cheaper(paths, actions) for paths in beam.unbind(1)], 1)  # [E, N, L]
            nats = torch.stack(
                [answer_loss(model, batch, fixed_paths(batch, child)).nats for child in children.unbind(1)], 1
            )
            costs = path_costs(children, actions)
            # A layer that is skipped cannot become cheaper: such a child is its parent.
            parents = path_costs(beam, actions).repeat_interleave(len(actions.free), 1)
            nats = nats.masked_fill(costs == parents, torch.inf)
            for max_cost in max_costs:
                paid = nats.masked_fill(costs > max_cost, torch.inf)
                better = paid.amin(1) < lowest[max_cost]
                lowest[max_cost] = torch.where(better, paid.amin(1), lowest[max_cost])
                best[max_cost][better] = _picked(children, paid.argmin(1))[better]
            beam = _least_lost(children, (nats - nats_at_full[:, None]) / (actions.full_cost - costs))
    found = {}
    for max_cost, paths in best.items():
        loss = answer_loss(model, batch, fixed_paths(batch, paths))
        found[max_cost] = FoundPaths(path_costs(paths, actions), loss.nats, loss.is_right)
    return found


def path_costs(paths: Tensor, actions: ActionSpace) -> Tensor:
    """[...] int64: milli-layers of paths [..., L]."""
    widest = actions.num_actions
    costs = torch.tensor([[*of, *[0] * (widest - len(of))] for of in actions.costs], device=paths.device)  # [L, A]
    return costs[torch.arange(len(costs)), paths.long()].sum(-1)


def _one_cheaper(paths: Tensor, actions: ActionSpace) -> Tensor:
    """[E, C, L]: paths [E, L] with each free layer in turn made cheaper, where it runs."""
    cheaper = torch.tensor(
        [SKIP, SKIP if actions.num_actions == 2 else SMALL, SKIP], dtype=torch.int8, device=paths.device
    )
    children = []
    for layer in actions.free:
        child = paths.clone()
        child[:, layer] = cheaper[child[:, layer].long()]
        children.append(child)
    return torch.stack(children, 1)


def _least_lost(children: Tensor, lost: Tensor) -> Tensor:
    """[E, BEAM_WIDTH, L]: of children [E, N, L], those with the lowest `lost` [E, N]."""
    best = []
    for _ in range(BEAM_WIDTH):
        chosen = _picked(children, lost.argmin(1))
        best.append(chosen)
        # Two parents can have the same child, which should not fill the beam twice.
        lost = lost.masked_fill((children == chosen[:, None]).all(-1), torch.inf)
    return torch.stack(best, 1)


def _picked(children: Tensor, index: Tensor) -> Tensor:
    """[E, L]: one of children [E, N, L] for each example, by index [E]."""
    return children[torch.arange(len(children)), index]
