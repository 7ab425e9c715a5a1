"""The likelihood of each example's answer at every depth: all the data for a Budget Predictor, measured once."""

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

from buddy_routing.action_space import MILLI_LAYERS
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router import LearnedRouter
from buddy_routing.train.answer_loss import answer_loss, prompt_features
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.routed_paths import routed_paths
from buddy_routing.train.training_state import check_run


@dataclass(frozen=True, slots=True)
class DepthRewards:
    """`features` are those at the prompts' last tokens, `log_likelihood` is that of the answers in nats at each of
    `levels`, which are numbers of layers."""

    features: Tensor  # [E, 2F]
    log_likelihood: Tensor  # [E, K]
    levels: tuple[int, ...]


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
    """Measure the examples in up to `num_batches` of `batches`, each answer under the router's own paths. Results
    already in `checkpoint` are not measured again.

    Raises OtherTrainingError for a checkpoint of another run; ValueError if there is no example.
    """
    device = model.inv_freq.device
    # Grouped by batch, so that a run with fewer batches than the checkpoint uses the first ones.
    features: list[Tensor] = []
    rows: list[Tensor] = []
    if checkpoint.exists():
        with safe_open(checkpoint, framework="pt") as file:
            check_run(checkpoint, file.metadata(), run)
            sizes = file.get_tensor("sizes").tolist()
            features = list(file.get_tensor("features").to(device).split(sizes))[:num_batches]
            rows = list(file.get_tensor("log_likelihood").to(device).split(sizes))[:num_batches]
    done = len(rows)
    bar = tqdm(islice(batches, done, num_batches), initial=done, total=num_batches, desc="depths", unit="batch")
    for host_batch in bar:
        batch = host_batch.to(device)
        features.append(prompt_features(model, batch))
        rows.append(torch.stack([_log_likelihood(model, router, route_block, batch, depth) for depth in levels], 1))
        _save(checkpoint, features, rows, run)
    if not rows:
        raise ValueError("there is no example to learn from")
    return DepthRewards(torch.cat(features), torch.cat(rows), levels)


def _save(path: Path, features: list[Tensor], rows: list[Tensor], run: str) -> None:
    tensors = {
        "features": torch.cat(features).cpu(),
        "log_likelihood": torch.cat(rows).cpu(),
        "sizes": torch.tensor([len(batch) for batch in rows]),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"run": run})
    partial.replace(path)


def _log_likelihood(
    model: RoutedDecoder, router: LearnedRouter, route_block: int, batch: ExampleBatch, depth: int
) -> Tensor:
    """[E]: the log likelihood of every answer at `depth` layers."""
    max_cost = torch.full_like(batch.tokens, MILLI_LAYERS * depth)
    choose = routed_paths(router, model.spec.actions, batch.begins, batch.in_answer, max_cost, route_block)
    loss = answer_loss(model, batch, choose)
    return -loss.nats * loss.num_tokens
