"""What gpu.py shows without a GPU: kernels compiled for cards, a step that waits for nobody and has one shape, and the
roofline."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from buddy_kernels.gpu import decode_step
from buddy_kernels.gpu.launch import Capability, Launch, recorded
from buddy_kernels.gpu.offline import (
    MODELS,
    ModelShape,
    all_compiled,
    compiled,
    print_reports,
    step_launches,
    step_without_values,
)
from buddy_kernels.gpu.roofline import CARD_SPEEDS, CardSpeed, StepPrediction, column_uses, predict
from buddy_kernels.gpu.row_lists import LayerLists, RowList, fill_layer_lists, fill_layer_lists_reference
from buddy_kernels.gpu.row_norm import norm_rows

MEASURED = ("Llama-1B", "Llama-3-8B", "Qwen2.5-7B")
SHAPES = tuple(shape for name in MEASURED for shape in MODELS if shape.name == name)
BATCHES = (1, 8, 32)
BUDGETS = (1.0, 0.75, 0.5)
CONTEXT = 512
FEW: tuple[tuple[Capability, int], ...] = (((8, 0), 8), ((9, 0), 1), ((10, 0), 8))
"""Cards and numbers of rows that are compiled for by default: a minute on a slow core, without Triton's cache."""
TINY = ModelShape("tiny", 4, 32, 4, 2, 8, 48, 97)
MOST_ROUTER, LEAST_BANDWIDTH, LEAST_OF_IDEAL = 0.02, 0.75, 0.95


@dataclass(frozen=True, slots=True)
class Work:
    """What is predicted or measured: rows, each with a budget; those of one budget share a path if they are `aligned`.
    `budget` None is equal parts of all three."""

    batch: int
    budget: float | None
    aligned: bool

    @property
    def budgets(self) -> list[float]:
        return [BUDGETS[row % len(BUDGETS)] if self.budget is None else self.budget for row in range(self.batch)]

    @property
    def name(self) -> str:
        return "mixed" if self.budget is None else f"{self.budget:g}"


def works(batch: int) -> list[Work]:
    """Full depth first. One row has a path of its own whether aligned or not, and so do all at full depth."""
    if batch == 1:
        return [Work(1, budget, True) for budget in BUDGETS]
    parts = [Work(batch, budget, aligned) for budget in (*BUDGETS[1:], None) for aligned in (True, False)]
    return [Work(batch, 1.0, True), *parts]


def depths_of(shape: ModelShape, work: Work) -> list[int]:
    """As ActionSpace.max_cost, in layers."""
    return [max(2, floor(budget * shape.num_layers + 1e-9)) for budget in work.budgets]


def predictions(shape: ModelShape, batch: int, card: CardSpeed) -> dict[Work, StepPrediction]:
    launches = step_launches(shape, torch.bfloat16, batch, card.capability)
    return {
        work: predict(launches, column_uses(shape.num_layers, depths_of(shape, work), work.aligned), CONTEXT, card)
        for work in works(batch)
    }


@dataclass(frozen=True, slots=True)
class RooflineRow:
    """`bandwidth` is the share of copy bandwidth at which weights and K/V are read, `ideal` the speedup over full depth
    if a step took as long as they take, `of_ideal` the predicted one's share of it, `router` that of router and
    bookkeeping in the step."""

    card: str
    model: str
    batch: int
    budget: str
    paths: str
    tokens_per_s: float
    bandwidth: float
    speedup: float
    ideal: float
    of_ideal: float
    router: float
    launches: int
    gigabytes: float

    @classmethod
    def of(
        cls, card: CardSpeed, shape: ModelShape, work: Work, predicted: StepPrediction, full: StepPrediction
    ) -> "RooflineRow":
        speedup, ideal = full.seconds / predicted.seconds, full.needed_bytes / predicted.needed_bytes
        return cls(
            card=card.name,
            model=shape.name,
            batch=work.batch,
            budget=work.name,
            paths="aligned" if work.aligned else "own",
            tokens_per_s=work.batch / predicted.seconds,
            bandwidth=predicted.needed_bytes / predicted.seconds / card.copy_bytes_per_s,
            speedup=speedup,
            ideal=ideal,
            of_ideal=speedup / ideal,
            router=predicted.router_s / predicted.seconds,
            launches=predicted.num_launches,
            gigabytes=predicted.memory_bytes / 1e9,
        )


def roofline_rows() -> list[RooflineRow]:
    rows = []
    for card in CARD_SPEEDS:
        for shape in SHAPES:
            for batch in BATCHES:
                of_work = predictions(shape, batch, card)
                full = next(iter(of_work.values()))
                rows += [RooflineRow.of(card, shape, work, made, full) for work, made in of_work.items()]
    return rows


def run_offline(everything: bool, json_path: Path | None) -> bool:
    """Print all that needs no GPU; whether no kernel spills and the proofs hold."""
    print("\nKernels compiled for cards that are not there (stack: bytes of registers that spill):")
    few = (
        report
        for capability, rows in FEW
        for report in compiled(SHAPES[0], torch.bfloat16, rows, capability, is_plain=True)
    )
    spilled = print_reports(all_compiled() if everything else few)
    print(f"{len(spilled)} kernels spill" + "".join(f"; {report.kernel}" for report in spilled))
    proofs = (prove_that_no_value_is_read, prove_that_launches_are_the_same)
    holds = [proof() for proof in proofs]
    print(f"\nRoofline, bf16, context {CONTEXT}, greedy; all that is assumed of cards is in roofline.py:")
    rows = roofline_rows()
    print_roofline(rows)
    if json_path is not None:
        with json_path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"kind": "roofline", **asdict(row)}) + "\n" for row in rows)
    return not spilled and all(holds)


def print_roofline(rows: Sequence[RooflineRow]) -> None:
    line = "{:<10} {:<11} {:>5} {:>6} {:<8} {:>8} {:>9} {:>7} {:>5} {:>8} {:>6} {:>8} {:>6}"
    names = "card model batch budget paths tokens/s bandwidth speedup ideal of-ideal router launches GB"
    print(line.format(*names.split()))
    for row in rows:
        shares = f"{row.bandwidth:.2f}", f"{row.speedup:.2f}", f"{row.ideal:.2f}", f"{row.of_ideal:.2f}"
        cells = row.card, row.model, row.batch, row.budget, row.paths, f"{row.tokens_per_s:.0f}", *shares
        print(line.format(*cells, f"{row.router:.3f}", row.launches, f"{row.gigabytes:.2f}"))
    alone = [row for row in rows if row.batch == 1]
    targets: dict[str, Callable[[RooflineRow], bool | None]] = {
        f"full depth at batch 1 at {LEAST_BANDWIDTH:g} of copy bandwidth": lambda row: (
            row.bandwidth >= LEAST_BANDWIDTH if row.speedup == 1 else None
        ),
        f"{LEAST_OF_IDEAL:g} of the ideal at batch 1": lambda row: (
            row.of_ideal >= LEAST_OF_IDEAL if row.speedup > 1 else None
        ),
        f"router and bookkeeping under {MOST_ROUTER:.0%} at batch 1": lambda row: row.router < MOST_ROUTER,
    }
    for name, holds in targets.items():
        missed = [f"{row.card} {row.model} at {row.budget}" for row in alone if holds(row) is False]
        print(f"{name}: " + (f"missed by {', '.join(missed)}" if missed else "by all"))


READS: dict[str, Callable[[RowList], object]] = {
    "a number": lambda rows: int(rows.count),
    "a condition": lambda rows: bool(rows.count > 0),
    "a copy": lambda rows: rows.indices.cpu(),
    "a list": lambda rows: rows.indices.tolist(),
    "a search": lambda rows: rows.indices.nonzero(),
}


def prove_that_no_value_is_read() -> bool:
    """What waits for the device does so to see a value: a step runs on tensors that have none."""
    with recorded((9, 0)) as launches, torch.device("meta"):
        for shape in SHAPES:
            for batch in BATCHES:
                step_without_values(shape, torch.bfloat16, batch, has_small_ffns=True).run(adjusts=True)
    print(f"\nSteps of tensors without values ran: {len(launches)} launches, none looks at a value")
    accepted = [name for name, read in READS.items() if not _is_refused(read)]
    print(f"Steps that read a value: {len(READS) - len(accepted)} of {len(READS)} refused")
    return not accepted


def _is_refused(read: Callable[[RowList], object]) -> bool:
    def reading_norm(x: Tensor, weight: Tensor, eps: float, rows: RowList, out: Tensor) -> None:
        read(rows)
        norm_rows(x, weight, eps, rows, out)

    with recorded((9, 0)), torch.device("meta"), patch.object(decode_step, "norm_rows", reading_norm):
        try:
            step_without_values(TINY, torch.bfloat16, 8, has_small_ffns=True).run(adjusts=True)
        except (RuntimeError, NotImplementedError):
            return True
    return False


def prove_that_launches_are_the_same() -> bool:
    """Whatever paths rows take: the launches of a step on real tensors, for several paths."""
    seen = _launches_for_paths()

    def norm_of_some(x: Tensor, weight: Tensor, eps: float, rows: RowList, out: Tensor) -> None:
        if int(rows.count):
            norm_rows(x, weight, eps, rows, out)

    with patch.object(decode_step, "norm_rows", norm_of_some):
        would_be_seen = len(set(_launches_for_paths())) > 1
    same = len(set(seen)) == 1
    print(f"Launches for {len(seen)} sets of paths: {'the same' if same else 'DIFFER'}")
    print(f"Of a step that leaves out what no row needs: {'they differ' if would_be_seen else 'NOT SEEN TO DIFFER'}")
    return same and would_be_seen


def _launches_for_paths() -> list[str]:
    """Of a step on a CPU's tensors, with paths from skipping all that may be skipped to random ones. Nothing runs: the
    lists that follow from the paths are written by the kernel's reference."""
    num_rows, seen = 8, []
    paths = torch.ones(num_rows, TINY.num_layers, dtype=torch.int8)
    between = paths[:, 1:-1]

    def fill_lists(written: Tensor, live: RowList, lists: LayerLists) -> None:
        fill_layer_lists(written, live, lists)
        everyone = RowList(torch.arange(num_rows, dtype=torch.int32), torch.tensor([num_rows], dtype=torch.int32))
        fill_layer_lists_reference(paths, everyone, lists)

    with recorded((9, 0)) as launches, patch.object(decode_step, "fill_layer_lists", fill_lists):
        step = step_without_values(TINY, torch.float32, num_rows, has_small_ffns=True)
        for seed in range(4):
            torch.manual_seed(seed)
            between.random_(0, 3) if seed else between.zero_()
            launches.clear()
            step.run(adjusts=True)
            seen.append(repr([_described(made) for made in launches]))
    return seen


def _described(made: Launch) -> tuple[object, ...]:
    tensors = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in made.tensors]
    return made.kernel.__name__, made.grid, tensors, made.constants, made.num_warps, made.num_stages
