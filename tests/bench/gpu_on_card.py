"""What gpu.py does on a card: checks, then what the card can do, then decode tokens/s beside the roofline and a peer.

Eight minutes are kept by leaving out: a part begins only if the time it is known to need is left."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from buddy_kernels import GREEDY
from buddy_kernels.gpu.decode_step import DecodeStep
from buddy_kernels.gpu.offline import ModelShape
from buddy_kernels.gpu.roofline import CARD_SPEEDS, CardSpeed, StepPrediction
from buddy_kernels.gpu.row_linear import row_linear
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.gpu.row_state import RowState
from buddy_server.bench.row import commit, write_row
from gpu_checks import run_checks
from gpu_models import (
    adjustments,
    begin,
    blocks_of,
    decode_model,
    random_cache,
    random_decoder,
    random_planner,
    random_rows,
    spec_of,
)
from gpu_offline import BATCHES, CONTEXT, SHAPES, TINY, Work, predictions, works
from gpu_peer import peer_step_s

LIMIT_S = 450.0
OURS_S, PEER_S = 80.0, 80.0
"""What a model takes, and one batch size of the peer with it: mostly compiling. Assumed."""
NUM_STEPS, NUM_ROUNDS = 64, 5
PEER_BATCHES = (1, 8)
COPIED_BYTES = 1 << 30
NUM_LAUNCHES = 256
SPREAD = 0.02
ROOM = 1.2
"""Memory that a model needs, over its weights and K/V."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """`tokens_per_s` of all rows together, the median of rounds; `layers_read` is how many layers any row ran, on
    average over steps; `speedup` is over our own full depth of the same batch. On a CPU, where the kernels are
    interpreted, times say nothing."""

    engine: str
    model: str
    batch: int
    budget: str
    paths: str
    tokens_per_s: float
    speedup: float
    layers_read: float | None
    bandwidth: float | None
    predicted_tokens_per_s: float | None
    of_predicted: float | None
    device: str
    commit: str


def run_on_card(device: torch.device, json_path: Path | None, started_s: float) -> bool:
    """Print all of it; whether the checks hold, without which nothing is timed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted: times say nothing"
    print(
        f"{name}, CUDA {torch.version.cuda}, {dtype_on(device)}, context {CONTEXT}, greedy, {num_steps(device)} steps"
    )
    if not run_checks(device):
        return False
    is_card = device.type == "cuda"
    card = measured_card(device) if is_card else None
    shapes, batches = (SHAPES, BATCHES) if is_card else ((TINY,), (1, 2))
    print(LINE.format(*COLUMNS.split()))
    rows: list[DecodeRow] = []

    def has_time(what: str, needed_s: float) -> bool:
        passed_s = time.perf_counter() - started_s
        has = not is_card or passed_s + needed_s <= LIMIT_S
        if not has:
            print(f"left out: {what}; {passed_s:.0f} s have passed, it may need {needed_s:.0f}")
        return has

    def add(row: DecodeRow) -> None:
        if json_path is not None:
            write_row(json_path, {"kind": "decode", **asdict(row)}, first=not rows)
        rows.append(row)
        print_row(row)

    for shape in shapes:
        if not fits(shape, device) or not has_time(shape.name, OURS_S):
            continue
        full: dict[int, float] = {}
        for row in measured(shape, batches, card, device, name):
            full.setdefault(row.batch, row.tokens_per_s)
            add(row)
        free_memory(device)
        # The third model is much like the second.
        for batch in PEER_BATCHES if shape is not SHAPES[-1] else ():
            what = f"transformers with {shape.name} at batch {batch}"
            if batch in full and has_time(what, PEER_S):
                try:
                    step_s = peer_step_s(shape, batch, CONTEXT - NUM_STEPS // 2, num_steps(device), device)
                except RuntimeError as error:  # Out of memory, or it does not compile: ours stands.
                    print(f"left out: {what}; {error}")
                else:
                    add(peer_row(shape, batch, step_s, full[batch], name))
            free_memory(device)
    return True


def dtype_on(device: torch.device) -> torch.dtype:
    """The interpreter rounds bf16 wrongly."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def num_steps(device: torch.device) -> int:
    return NUM_STEPS if device.type == "cuda" else 1


def measured_card(device: torch.device) -> CardSpeed | None:
    """The card as the roofline knows it, with the bandwidth and the time of a launch that are measured."""
    copied, launch_s = copy_bytes_per_s(device), empty_launch_s(device)
    print(f"copy {copied / 1e12:.2f} TB/s, a launch in a graph that leaves at once {launch_s * 1e6:.2f} us")
    capability = torch.cuda.get_device_capability(device)
    known = next((card for card in CARD_SPEEDS if card.capability == capability), None)
    if known is None:
        print(f"the roofline knows no card of capability {capability}")
        return None
    print(f"the roofline predicts by these two, and for the rest by its {known.name}")
    return replace(known, peak_bytes_per_s=copied, copy_share=1.0, launch_s=launch_s)


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written, of the best of ten copies."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / min(elapsed_s(lambda: target.copy_(source), device) for _ in range(10))


def empty_launch_s(device: torch.device) -> float:
    """Of a product whose list is empty."""
    weight, x = (torch.zeros(size, 4096, dtype=torch.bfloat16, device=device) for size in (4096, 1))
    out, indices = torch.zeros_like(x), torch.zeros(1, dtype=torch.int32, device=device)
    nobody = RowList(indices, torch.zeros_like(indices))

    def launch_all() -> None:
        for _ in range(NUM_LAUNCHES):
            row_linear(x, weight, None, nobody, out)

    replay = captured(launch_all)
    return min(elapsed_s(replay, device) for _ in range(10)) / NUM_LAUNCHES


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Launched at once by a graph; compiled and warmed up before."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def elapsed_s(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begins.record()
    run()
    ends.record()
    ends.synchronize()
    return begins.elapsed_time(ends) / 1e3


@torch.inference_mode()
def measured(
    shape: ModelShape, batches: Sequence[int], card: CardSpeed | None, device: torch.device, name: str
) -> Iterator[DecodeRow]:
    """A row for all work of each batch size, full depth first."""
    num_positions, most, steps = CONTEXT + NUM_STEPS, max(batches), num_steps(device)
    model = random_decoder(spec_of(shape, num_positions), dtype_on(device), device, SPREAD)
    planner, cache = random_planner(model, most), random_cache(model, most, num_positions)
    of_model = decode_model(model, planner, cache, num_positions)
    state = RowState.empty(most, blocks_of(num_positions), model.spec.num_columns, device)
    for batch in batches:
        of_batch = state.first(batch)
        step = DecodeStep(of_model, of_batch, adjustments(batch, shape.vocab, device))
        state.live.count.zero_()
        run: Callable[[], None] = partial(step.run, False)
        if device.type == "cuda":
            run = captured(run)
        expected = {} if card is None else predictions(shape, batch, card)
        full = 0.0
        for work in works(batch):
            positions = [CONTEXT - NUM_STEPS // 2] * batch
            rows = random_rows(
                model.spec, work.budgets, positions, num_positions, [GREEDY] * batch, NUM_STEPS + 1, work.aligned
            )
            times_s = []
            for _ in range(1 + NUM_ROUNDS if device.type == "cuda" else 1):
                begin(of_batch, rows)
                times_s.append(elapsed_s(partial(repeat, run, steps), device) / steps)
            tokens_per_s = batch / median(times_s[1:] or times_s)
            full = full or tokens_per_s
            layers_read = float((state.ran_paths[:steps, :batch] != 0).any(1).sum(1).float().mean())
            yield our_row(shape, work, tokens_per_s, full, layers_read, expected.get(work), card, name)


def repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def our_row(
    shape: ModelShape,
    work: Work,
    tokens_per_s: float,
    full: float,
    layers_read: float,
    predicted: StepPrediction | None,
    card: CardSpeed | None,
    name: str,
) -> DecodeRow:
    bandwidth = of_predicted = expected = None
    if predicted is not None and card is not None:
        expected = work.batch / predicted.seconds
        of_predicted = tokens_per_s / expected
        bandwidth = predicted.needed_bytes * tokens_per_s / work.batch / card.copy_bytes_per_s
    return DecodeRow(
        engine="buddy",
        model=shape.name,
        batch=work.batch,
        budget=work.name,
        paths="aligned" if work.aligned else "own",
        tokens_per_s=tokens_per_s,
        speedup=tokens_per_s / full,
        layers_read=layers_read,
        bandwidth=bandwidth,
        predicted_tokens_per_s=expected,
        of_predicted=of_predicted,
        device=name,
        commit=commit(),
    )


def peer_row(shape: ModelShape, batch: int, step_s: float, full: float, name: str) -> DecodeRow:
    tokens_per_s = batch / step_s
    return DecodeRow(
        engine="transformers",
        model=shape.name,
        batch=batch,
        budget="1",
        paths="",
        tokens_per_s=tokens_per_s,
        speedup=tokens_per_s / full,
        layers_read=None,
        bandwidth=None,
        predicted_tokens_per_s=None,
        of_predicted=None,
        device=name,
        commit=commit(),
    )


COLUMNS = "engine model batch budget paths tokens/s speedup layers bandwidth predicted of-predicted"
LINE = "{:<12} {:<11} {:>5} {:>6} {:<8} {:>8} {:>7} {:>6} {:>9} {:>9} {:>12}"


def print_row(row: DecodeRow) -> None:
    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    measured_cells = cell(row.tokens_per_s, 0), cell(row.speedup, 2), cell(row.layers_read, 1), cell(row.bandwidth, 2)
    predicted_cells = cell(row.predicted_tokens_per_s, 0), cell(row.of_predicted, 2)
    cells = row.engine, row.model, row.batch, row.budget, row.paths, *measured_cells, *predicted_cells
    print(LINE.format(*cells), flush=True)


def fits(shape: ModelShape, device: torch.device) -> bool:
    """Whether weights and K/V of the largest batch have room."""
    if device.type != "cuda":
        return True
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    of_layer = 2 * shape.dim * (q_width + kv_width) + 3 * shape.dim * shape.mlp_dim
    of_kv = 2 * kv_width * max(BATCHES) * (CONTEXT + NUM_STEPS)
    needed = 2 * ROOM * (shape.num_layers * (of_layer + of_kv) + shape.vocab * shape.dim)
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        print(f"left out: {shape.name}; needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    return needed <= free


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
