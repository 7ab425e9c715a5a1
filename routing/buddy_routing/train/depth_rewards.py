"""How likely each example's answer is at every depth: all that a Budget Predictor learns from, measured once."""

# E examples, L layers, K depths tried, F width of one token's V

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router import LearnedRouter
from buddy_routing.train.answer_loss import answer_loss, prompt_features
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.routed_paths import routed_paths
from buddy_routing.train.training_state import check_run

SAVE_EVERY = 5


@dataclass(frozen=True, slots=True)
class DepthRewards:
    """`features` at the prompts' last tokens, `log_likelihood` of the answers in nats at each of `levels`, which are
    numbers of layers."""

    features: Tensor  # [E, 2F]
    log_likelihood: Tensor  # [E, K]
    levels: tuple[int, ...]

    def save(self, path: Path, num_batches: int, run: str) -> None:
        partial = path.with_suffix(".partial")
        tensors = {"features": self.features, "log_likelihood": self.log_likelihood}
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"num_batches": str(num_batches), "run": run},
        )
        partial.replace(path)


def measure_depth_rewards(
    model: RoutedDecoder,
    router: LearnedRouter,
    route_block: int,
    batches: Iterator[ExampleBatch],
    levels: tuple[int, ...],
    num_batches: int,
    checkpoint: Path,
    run: str,
) -> DepthRewards:
    """Of the examples in at most `num_batches` of `batches`, every answer under the router's own paths. What
    `checkpoint` holds is not measured again.

    Raises OtherTrainingError for a checkpoint of another run; ValueError when there is no example.
    """
    device = model.inv_freq.device
    features: list[Tensor] = []
    rows: list[Tensor] = []
    done = 0
    if checkpoint.exists():
        with safe_open(checkpoint, framework="pt") as file:
            check_run(checkpoint, file.metadata(), run)
            features.append(file.get_tensor("features").to(device))
            rows.append(file.get_tensor("log_likelihood").to(device))
            done = int(file.metadata()["num_batches"])

    def measured() -> DepthRewards:
        return DepthRewards(torch.cat(features), torch.cat(rows), levels)

    bar = tqdm(islice(batches, done, num_batches), initial=done, total=num_batches, desc="depths", unit="batch")
    for number, host_batch in enumerate(bar, done + 1):
        batch = host_batch.to(device)
        features.append(prompt_features(model, batch))
        rows.append(torch.stack([_log_likelihood(model, router, route_block, batch, depth) for depth in levels], 1))
        if number % SAVE_EVERY == 0:
            measured().save(checkpoint, number, run)
    if not rows:
        raise ValueError("there is no example to learn from")
    return measured()


def _log_likelihood(
    model: RoutedDecoder, router: LearnedRouter, route_block: int, batch: ExampleBatch, depth: int
) -> Tensor:
    """[E]: of every answer at `depth` layers."""
    layers = torch.full_like(batch.tokens, depth)
    loss = answer_loss(model, batch, routed_paths(router, batch.begins, batch.in_answer, layers, route_block))
    return -loss.nats * loss.num_tokens
