"""Trains exits on a finished model: each is to predict what the whole model does (Balcony, arXiv 2503.05005).

Only the exits have gradients, so that full depth remains the model. The teacher is the same forward pass.
"""

# B rows of examples, T tokens

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from buddy_routing.checkpoint import LoadedModel
from buddy_routing.decoder import Exit, RoutedDecoder
from buddy_routing.exits import new_exits
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router_config import ExitsConfig
from buddy_routing.train.batch_training import train_on_batches
from buddy_routing.train.example import Example, ExampleBatch
from buddy_routing.train.exits_plan import ExitsPlan
from buddy_routing.train.training_state import run_name

WARM_UP = 0.01
MOST_NORM = 1.0


class ExitsLoss(nn.Module):
    """The training loss as a module, so that accelerate can wrap it."""

    def __init__(self, model: RoutedDecoder) -> None:
        super().__init__()
        self.exits = model.exits
        # In a tuple, so that the frozen model is not a submodule: it is neither saved nor synchronised.
        self._model = (model,)

    def forward(self, batch: ExampleBatch) -> Tensor:
        """KL(full depth || exit) over the answers' tokens, the mean of all exits."""
        (model,) = self._model
        full, left = model.dense_exits(batch.tokens, conversation_starts(batch.begins))
        with torch.no_grad():
            teacher = model.lm_head(full[batch.counted]).float().log_softmax(-1)
        losses = [
            F.kl_div(
                model.lm_head(hidden[batch.counted]).float().log_softmax(-1),
                teacher,
                reduction="batchmean",
                log_target=True,
            )
            for hidden in left
        ]
        return torch.stack(losses).mean()


def train_exits(
    loaded: LoadedModel,
    examples: Iterator[Example],
    plan: ExitsPlan,
    num_steps: int,
    checkpoint: Path,
    log_directory: Path | None = None,
    data_name: str = "",
) -> tuple[dict[int, Exit], ExitsConfig]:
    """Train exits in fp32; resumes from `checkpoint` if it exists. The same seed gives the same exits.

    Raises what train_on_batches raises, and ValueError for exits that the model cannot have.
    """
    exits = new_exits(loaded.model, plan.exits)
    train_on_batches(
        "exits",
        ExitsLoss(loaded.model.with_exits(exits)),
        lambda batch, _: (batch,),
        warmed_cosine,
        examples,
        plan,
        num_steps,
        checkpoint,
        run_name(loaded.fingerprint, data_name, plan, num_steps),
        loaded.model.inv_freq.device,
        log_directory,
        MOST_NORM,
    )
    return exits, ExitsConfig(loaded.fingerprint, plan.exits)


def warmed_cosine(done: float) -> float:
    """The share of the learning rate after the share `done` of the steps."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
