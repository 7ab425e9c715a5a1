"""A baseline in the style of PuDDing (arXiv 2502.04348): a few static rankings, one of them chosen per prompt.

The rankings are greedy removal orders of groups of similar prompts; a linear classifier on the prompt's features learns
which ranking answers best. The published method instead chooses with a separate encoder, and has a set per sparsity.
"""

# E examples, K rankings, L layers, N tokens, F width of one token's V

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.prior import measure_prior
from buddy_routing.router import PromptSetRouter
from buddy_routing.selection import select_path
from buddy_routing.train.answer_loss import answer_loss, example_of_token, fixed_paths, prompt_features
from buddy_routing.train.example import ExampleBatch

NUM_SETS = 4
NUM_ROUNDS = 20
NUM_STEPS = 300
BUDGETS = (0.75, 0.5)
CALIBRATION_TOKENS = 512


def train_prompt_sets(model: RoutedDecoder, batches: Sequence[ExampleBatch], seed: int) -> PromptSetRouter:
    """A router calibrated and trained on `batches`."""
    torch.manual_seed(seed)
    features = torch.cat([prompt_features(model, batch) for batch in batches])  # [E, 2F]
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - mean) / std
    groups = _nearest(scaled, _centres(scaled, NUM_SETS))
    texts = [text for batch in batches for text in _texts(batch)]
    rankings = torch.stack([_ranking(model, texts, groups == number) for number in range(NUM_SETS)])
    losses = _losses(model, batches, rankings)  # [E, K]
    classifier = nn.Linear(scaled.shape[1], NUM_SETS)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=0.1)
    # A ranking that answers slightly worse than the best is slightly wrong, not as wrong as any other.
    targets = (-10 * losses).softmax(-1)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(classifier(scaled), targets).backward()
        optimizer.step()
    with torch.no_grad():
        weight = classifier.weight / std
        bias = classifier.bias - weight @ mean
    return PromptSetRouter(rankings, weight, bias, f"prompt-sets:{seed}")


def _centres(points: Tensor, count: int) -> Tensor:
    """Lloyd's k-means: points [E, 2F] -> [K, 2F]."""
    centres = points[torch.randperm(len(points))[:count]]
    for _ in range(NUM_ROUNDS):
        nearest = _nearest(points, centres)
        means = [points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)]
        centres = torch.stack(means)
    return centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres).argmin(1)


def _texts(batch: ExampleBatch) -> list[Tensor]:
    """The tokens of every example, in reading order."""
    example = example_of_token(batch)
    return [batch.tokens[example == number] for number in range(int(example[batch.in_answer].max()) + 1)]


def _ranking(model: RoutedDecoder, texts: Sequence[Tensor], members: Tensor) -> Tensor:
    """The removal order on the texts marked in `members` [E]; on all texts if none is marked."""
    chosen = [text for text, is_member in zip(texts, members.tolist(), strict=True) if is_member] or texts
    return measure_prior(model, torch.cat(list(chosen))[:CALIBRATION_TOKENS][None], "greedy")


def _losses(model: RoutedDecoder, batches: Sequence[ExampleBatch], rankings: Tensor) -> Tensor:
    """[E, K]: nats of every answer under every ranking, averaged over BUDGETS."""
    columns = []
    for ranking in rankings:
        nats = []
        for batch in batches:
            num_examples = len(prompt_features(model, batch))
            of_budgets = []
            for budget in BUDGETS:
                max_cost = torch.tensor([model.spec.actions.max_cost(budget)])
                paths = select_path(ranking[None], max_cost, model.spec.actions).expand(num_examples, -1)
                of_budgets.append(answer_loss(model, batch, fixed_paths(batch, paths)).nats)
            nats.append(torch.stack(of_budgets).mean(0))
        columns.append(torch.cat(nats))
    return torch.stack(columns, 1)
