"""How right each example's answer is at every depth: all the data for a Budget Predictor, measured once."""

# B rows of examples, T tokens, E examples, K depths, F width of one token's V

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.exits import ExitRouter
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import LearnedRouter
from buddy_routing.train.answer_loss import AnswerLoss, answer_loss, loss_of_states, prompt_features
from buddy_routing.train.batch_table import Columns, measure_batches
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.routed_paths import routed_paths


@dataclass(frozen=True, slots=True)
class DepthTable:
    """`features` are those at the prompts' last tokens. `quality` is 1 where an answer is right at that depth, and 0
    where it is not; for an answer that is right at none, it is the share of its tokens that are right."""

    features: Tensor  # [E, 2F]
    quality: Tensor  # [E, K]


def measure_depth_table(
    model: RoutedDecoder,
    router: LearnedRouter | ExitRouter,
    route_block: int,
    batches: Iterator[ExampleBatch],
    depths: Sequence[int],
    num_batches: int,
    checkpoint: Path,
    run: str,
) -> DepthTable:
    """Measure the examples in up to `num_batches` of `batches` at each of `depths`, milli-layers of a token. A router
    chooses every answer's own paths; exits are those of `model`. Resumes and raises as measure_batches does.
    """

    def measure(batch: ExampleBatch, _: int) -> Columns:
        quality = _quality(list(_answers(model, router, route_block, batch, depths)))
        return {"features": prompt_features(model, batch), "quality": quality}

    device = model.inv_freq.device
    columns = measure_batches("depths", measure, batches, num_batches, checkpoint, run, device)
    return DepthTable(columns["features"], columns["quality"])


def _answers(
    model: RoutedDecoder,
    router: LearnedRouter | ExitRouter,
    route_block: int,
    batch: ExampleBatch,
    depths: Sequence[int],
) -> Iterator[AnswerLoss]:
    """The answers of a batch at each of `depths`."""
    actions = model.spec.actions
    if isinstance(router, ExitRouter):
        with torch.no_grad():
            full, left = model.dense_exits(batch.tokens, conversation_starts(batch.begins))
        hidden = dict(zip(actions.depths, [*left, full], strict=True))
        yield from (loss_of_states(model, batch, hidden[depth]) for depth in depths)
        return
    for depth in depths:
        max_cost = torch.full_like(batch.tokens, depth)
        choose = routed_paths(router, actions, batch.begins, batch.in_answer, max_cost, route_block)
        yield answer_loss(model, batch, choose)


def _quality(answers: Sequence[AnswerLoss]) -> Tensor:
    """[E, K], as in DepthTable."""
    is_right = torch.stack([answer.is_right for answer in answers], 1)
    agreement = torch.stack([answer.agreement for answer in answers], 1)
    return torch.where(is_right.any(1, keepdim=True), is_right.float(), agreement)
