"""Tables that are measured batch by batch, each batch once: the data for fits that no longer need the model."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.training_state import check_run

Columns = dict[str, Tensor]
"""Columns of a table by name. Their first dim is the rows."""


def measure_batches(
    name: str,
    measure: Callable[[ExampleBatch, int], Columns],
    batches: Iterator[ExampleBatch],
    num_batches: int,
    checkpoint: Path,
    run: str,
    device: torch.device,
) -> Columns:
    """The rows that `measure` makes of up to `num_batches` of `batches` and their numbers. What `checkpoint` already
    holds is not measured again; `run` is a run_name.

    Raises OtherTrainingError for a checkpoint of another run; ValueError if there is no example.
    """
    # Grouped by batch, so that a run with fewer batches than the checkpoint uses the first ones.
    measured = _load(checkpoint, run, device)[:num_batches] if checkpoint.exists() else []
    done = len(measured)
    bar = tqdm(islice(batches, done, num_batches), initial=done, total=num_batches, desc=name, unit="batch")
    for number, batch in enumerate(bar, done):
        measured.append(measure(batch.to(device), number))
        _save(checkpoint, measured, run)
    if not measured:
        raise ValueError("there is no example to learn from")
    return _joined(measured)


def _joined(measured: Sequence[Columns]) -> Columns:
    return {name: torch.cat([columns[name] for columns in measured]) for name in measured[0]}


def _load(path: Path, run: str, device: torch.device) -> list[Columns]:
    with safe_open(path, framework="pt") as file:
        check_run(path, file.metadata(), run)
        sizes = file.get_tensor("sizes").tolist()
        names = [name for name in file.keys() if name != "sizes"]  # noqa: SIM118 (not a mapping)
        columns = [file.get_tensor(name).to(device).split(sizes) for name in names]
    return [dict(zip(names, parts, strict=True)) for parts in zip(*columns, strict=True)]


def _save(path: Path, measured: Sequence[Columns], run: str) -> None:
    tensors = {name: column.cpu() for name, column in _joined(measured).items()}
    sizes = [len(next(iter(columns.values()))) for columns in measured]
    partial = path.with_suffix(".partial")
    save_file({**tensors, "sizes": torch.tensor(sizes)}, partial, metadata={"run": run})
    partial.replace(path)
