"""What variations of a router's paths do to answers: all the data for a correction of its scores, measured once."""

# B rows of examples, T tokens, N tokens before which an answer's tokens come, V vocabulary, K budgets, P paths at a
# budget, C free layers, F width of one token's V

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.action_space import RUN
from buddy_routing.decoder import PathChooser, RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import Router
from buddy_routing.train.answer_loss import example_of_token
from buddy_routing.train.batch_table import Columns, measure_batches
from buddy_routing.train.correction_plan import CorrectionPlan
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.routed_paths import routed_paths

NOISE = (0.75, 2.25, 3.75)
"""Standard deviations of the noise on the scores, in units of how far a typical score is from the median."""


@dataclass(frozen=True, slots=True)
class PathTable:
    """The first of a budget's paths is the router's own. `nats` is a token's KL to the model at full depth, `features`
    are those that decide the token's path."""

    features: Tensor  # [N, 2F]
    is_last: Tensor  # [N] bool: the last token of an example
    runs: Tensor  # [N, K, P, C] int8: 1 where the path runs the layer
    nats: Tensor  # [N, K, P]


class NoisyRouter:
    """A router with noise [B, T, C] on its scores."""

    router_id = "noisy"
    reroute_every = 1

    def __init__(self, router: Router, noise: Tensor) -> None:
        self._router, self._noise = router, noise

    def scores(self, features: Tensor) -> Tensor:
        return self._router.scores(features) + self._noise


def measure_path_table(
    model: RoutedDecoder,
    router: Router,
    route_block: int,
    batches: Iterator[ExampleBatch],
    max_costs: Sequence[int],
    plan: CorrectionPlan,
    checkpoint: Path,
    run: str,
) -> PathTable:
    """Measure the answers in up to `plan.num_batches` of `batches` under the router's own path and its random
    variations, at each of `max_costs`, milli-layers of a token. Resumes and raises as measure_batches does."""
    device = model.inv_freq.device
    num_paths = 1 + plan.num_variations

    @torch.no_grad()
    def measure(batch: ExampleBatch, number: int) -> Columns:
        generator = torch.Generator(device).manual_seed(random.Random(f"{plan.seed}:{number}").getrandbits(63))
        starts = conversation_starts(batch.begins)
        v = FirstLayer.of(model).v(batch.tokens)
        features = causal_features(v, starts)
        scores = router.scores(features)[batch.counted]
        # At least a little, so that a router that scores all layers equally has variations, too.
        typical = (scores - scores.median(-1, keepdim=True).values).abs().median().clamp_min(1e-6)
        teacher = _log_probs(model, batch, model.dense(batch.tokens, starts=starts))
        runs, nats = [], []
        for max_cost in max_costs:
            for variation in range(num_paths):
                noise = typical * _noise(batch, scores.shape[-1], variation, generator)
                limit = torch.full_like(batch.tokens, max_cost)
                noisy = NoisyRouter(router, noise)
                choose = routed_paths(noisy, model.spec.actions, batch.begins, batch.in_answer, limit, route_block)
                ran, of_path = _measured(model, batch, choose, v, teacher)
                runs.append(ran)
                nats.append(of_path)
        example = example_of_token(batch)[batch.counted]
        by_budget = (len(max_costs), num_paths)
        return {
            "features": features[batch.counted],
            "is_last": F.pad(example[1:] != example[:-1], (0, 1), value=True),
            "runs": torch.stack(runs, 1).unflatten(1, by_budget),
            "nats": torch.stack(nats, 1).unflatten(1, by_budget),
        }

    return PathTable(**measure_batches("paths", measure, batches, plan.num_batches, checkpoint, run, device))


def _noise(batch: ExampleBatch, num_scores: int, variation: int, generator: torch.Generator) -> Tensor:
    """[B, T, C]: none for the router's own path; then alternately the same for all tokens of an example, which finds
    what a path does to the tokens that follow, and each token's own."""
    device = batch.tokens.device
    if variation == 0:
        return torch.zeros(*batch.tokens.shape, num_scores, device=device)
    if variation % 2:
        example = example_of_token(batch)
        drawn = torch.randn(int(example.max()) + 1, num_scores, generator=generator, device=device)[example]
    else:
        drawn = torch.randn(*batch.tokens.shape, num_scores, generator=generator, device=device)
    return NOISE[variation % len(NOISE)] * drawn


def _measured(
    model: RoutedDecoder, batch: ExampleBatch, choose: PathChooser, v: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Which free layers run [N, C] int8, and the KL to the `teacher` [N], log probabilities [N, V]. `v` are the first
    layer's V states."""
    shares = choose(v)  # [B, T, L, 1]
    hidden = model.dense(batch.tokens, lambda _: shares, starts=conversation_starts(batch.begins))
    student = _log_probs(model, batch, hidden)
    nats = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    ran = shares[batch.counted][:, model.spec.actions.free, RUN - 1]
    return (ran > 0.5).to(torch.int8), nats


def _log_probs(model: RoutedDecoder, batch: ExampleBatch, hidden: Tensor) -> Tensor:
    """[N, V], from final hidden states [B, T, D]."""
    logits: Tensor = model.lm_head(hidden[batch.counted]).float()
    return logits.log_softmax(-1)
