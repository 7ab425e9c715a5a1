"""An upper bound on paths: the best path for each prompt, found by beam search on the true answer. Not a method.

The search sees the answer, which a router cannot; but it gives each prompt one path, and a router may change it at
every token.
"""

# E examples, W beam width, L layers

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.train.answer_loss import answer_loss, fixed_paths
from buddy_routing.train.example import ExampleBatch

BEAM_WIDTH = 2


def search_paths(model: RoutedDecoder, batch: ExampleBatch, budgets: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each of `budgets` (layers to run), deepest first: which examples [E] are answered exactly like their
    reference.

    Each step removes one layer from every path in the beam; the `BEAM_WIDTH` paths of an example with the lowest loss
    remain.
    """
    num_layers = model.spec.num_layers
    full = torch.ones(num_layers, dtype=torch.int8, device=batch.tokens.device)
    num_examples = int((batch.counted & ~batch.in_answer).sum())
    beam = full.expand(num_examples, 1, num_layers)  # [E, W, L]
    depths = range(num_layers - 1, min(budgets) - 1, -1)
    for num_run in tqdm(depths, desc="search bound", unit="layer"):
        beam = _one_less(model, batch, beam)
        if num_run in budgets:
            yield num_run, answer_loss(model, batch, fixed_paths(batch, beam[:, 0])).is_right


def _one_less(model: RoutedDecoder, batch: ExampleBatch, beam: Tensor) -> Tensor:
    """The best paths with one layer less than those of beam [E, W, L]: [E, BEAM_WIDTH, L], best first."""
    tried, losses = [], []
    free = model.spec.actions.free
    for parents in beam.unbind(1):
        num_left = int(parents[0, free].sum())
        for number in range(num_left):
            child = parents.clone()
            # The number-th free layer that the path still runs.
            runs = child[:, free]
            child[:, free] = runs * ~((runs.cumsum(1) - 1 == number) & (runs > 0))
            tried.append(child)
            losses.append(answer_loss(model, batch, fixed_paths(batch, child)).nats)
    children, nats = torch.stack(tried, 1), torch.stack(losses, 1)  # [E, C, L], [E, C]
    best = []
    for _ in range(BEAM_WIDTH):
        index = nats.argmin(1)
        chosen = children[torch.arange(len(children)), index]
        best.append(chosen)
        # Two parents can have the same child, which should not fill the beam twice.
        nats = nats.masked_fill((children == chosen[:, None]).all(-1), torch.inf)
    return torch.stack(best, 1)
