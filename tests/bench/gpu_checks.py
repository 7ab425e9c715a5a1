"""Checks of gpu.py before it times anything: ops against their references, whole steps against TorchStepper's, calls of
several steps against single ones. On a CPU, where Triton interprets, the same checks run on the same sizes."""

# N rows, V vocabulary

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from buddy_kernels import GREEDY, PathAction, RoutedOutput, Sampling, StepRows
from buddy_kernels.gpu import decode_step
from buddy_kernels.gpu.decode_step import DecodeStep
from buddy_kernels.gpu.offline import ModelShape
from buddy_kernels.gpu.row_state import RowState
from buddy_routing.gpu_stepper import GpuStepper
from buddy_routing.stepper import TorchStepper
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
    with_actions,
)
from path_choice_reference import choose_paths_reference
from tolerances import distance, kind_of, tolerance

OPS = (
    "begin_step",
    "norm_rows",
    "row_qkv",
    "score_layers",
    "fill_layer_lists",
    "attend",
    "add_row_linear",
    "row_swiglu",
    "row_linear",
    "adjust_logits",
    "draw_tokens",
    "end_step",
)
"""Of decode_step, besides choose_paths: each has its reference beside it."""
LLAMA = ModelShape("tiny Llama", 4, 48, 4, 2, 16, 80, 97)
ODD = ModelShape("tiny and odd", 4, 63, 3, 1, 10, 131, 257, has_qkv_bias=True, has_qk_norm=True, window=20)
NUM_POSITIONS = 64
BUDGETS = (0.5, 1.0, 0.75, 0.5, 1.0)
POSITIONS = (0, 15, 16, 40, 62)
SAMPLING = (
    GREEDY,
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.0),
    Sampling(temperature=1.2, top_k=20),
    Sampling(temperature=0.7, min_p=0.1),
)
SPREAD = 0.2
"""Of weights, ten times the usual, so that layers matter to the output."""
NUM_STEPS = 2


def run_checks(device: torch.device) -> bool:
    """Print each check with how it ended; whether all passed."""
    of_ops = [
        (shape, actions, dtype, num_rows)
        for shape, actions in ((LLAMA, "small FFNs"), (ODD, "plain"))
        for dtype in (torch.float32, torch.bfloat16)
        for num_rows in (1, len(BUDGETS))
    ]
    if device.type != "cuda":  # A program is a millisecond there, and bf16 is rounded wrongly.
        of_ops = [(LLAMA, "small FFNs", torch.float32, 1), (ODD, "plain", torch.float32, 2)]
    checks: dict[str, Callable[[], str]] = {}
    for shape, actions, dtype, num_rows in of_ops:
        name = f"ops, {shape.name}, {actions}, {str(dtype).removeprefix('torch.')}, {num_rows} rows"
        checks[name] = partial(check_ops, shape, actions, dtype, num_rows, device)
    for actions in ("small FFNs", "exits"):
        checks[f"a captured step is TorchStepper's, {actions}"] = partial(check_step, actions, device)
    checks[f"a call of {NUM_STEPS} steps is {NUM_STEPS} calls"] = partial(check_calls, device)
    failed = 0
    for name, check in checks.items():
        started_s = time.perf_counter()
        torch.manual_seed(3)
        try:
            told = check()
        except AssertionError as error:
            failed += 1
            told = f"FAILED: {error}"
        print(f"{name}: {told} ({time.perf_counter() - started_s:.1f} s)", flush=True)
    return not failed


@torch.inference_mode()
def check_ops(shape: ModelShape, actions: str, dtype: torch.dtype, num_rows: int, device: torch.device) -> str:
    """Run a step in which every op is compared, on what the step gives it; two more rows than are live are NaN."""
    model = with_actions(random_decoder(spec_of(shape, NUM_POSITIONS), dtype, device, SPREAD), actions)
    spec, room = model.spec, num_rows if num_rows == 1 else num_rows + 2
    planner, cache = random_planner(model, room), random_cache(model, room, NUM_POSITIONS)
    state = RowState.empty(room, blocks_of(NUM_POSITIONS), spec.num_columns, device)
    rows = random_rows(spec, BUDGETS[:num_rows], POSITIONS[-num_rows:], NUM_POSITIONS, SAMPLING[:num_rows])
    begin(state, rows)
    of_model = decode_model(model, planner, cache, NUM_POSITIONS)
    with poisoned_memory():
        step = DecodeStep(of_model, state, adjustments(room, spec.vocab_size, device))
    compared: Counter[str] = Counter()
    width = max(spec.intermediate_size, NUM_POSITIONS)
    references = {
        name: getattr(sys.modules[getattr(decode_step, name).__module__], f"{name}_reference") for name in OPS
    }
    references["choose_paths"] = partial(choose_paths_reference, spec.actions)
    with ExitStack() as patches:
        for name, reference in references.items():
            run = comparing(getattr(decode_step, name), reference, width, compared)
            patches.enter_context(patch.object(decode_step, name, run))
        step.run(adjusts=True)
        begin(state, rows)
        step.run(adjusts=False)
    missing = references.keys() - compared.keys()
    assert not missing, f"not compared: {missing}"
    return f"{compared.total()} launches compared, of {len(compared)} ops"


def comparing(
    op: Callable[..., None], reference: Callable[..., None], width: int, compared: Counter[str]
) -> Callable[..., None]:
    """`op`, which then looks whether its reference does the same with the same arguments."""

    def run(*arguments: Any) -> None:
        copies = deepcopy(arguments)
        op(*arguments)
        reference(*copies)
        for got, want in zip(tensors_of(arguments), tensors_of(copies), strict=True):
            check_same(op.__name__, got, want, width)
        compared[op.__name__] += 1

    return run


def tensors_of(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, tuple | list):
        for part in given:
            yield from tensors_of(part)
    elif is_dataclass(given):
        for field in fields(given):
            yield from tensors_of(getattr(given, field.name))


def check_same(what: str, got: Tensor, want: Tensor, width: int, depth: int = 1) -> None:
    """To the bit, but for what a model computes: that up to rounding, by tests/tolerances.py."""
    if got.dtype not in (torch.float32, torch.bfloat16):
        assert torch.equal(got, want), f"{what} makes other numbers than its reference"
        return
    numbers = ~want.isnan()
    assert torch.equal(~got.isnan(), numbers), f"{what} writes other places than its reference"
    off, allowed = distance(got[numbers], want[numbers]), tolerance(kind_of(want), width, depth)
    assert off <= allowed or torch.equal(got[numbers], want[numbers]), f"{what} is {off:.2g} off, not {allowed:.2g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN, and the largest number of integers, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.inference_mode()
def check_step(actions: str, device: torch.device) -> str:
    """Rows with budgets of their own, fewer than the graph has."""
    model = with_actions(random_decoder(spec_of(LLAMA, NUM_POSITIONS), torch.float32, device, SPREAD), actions)
    spec, num_rows = model.spec, 3
    planner, cache = random_planner(model, num_rows + 1), random_cache(model, num_rows + 1, NUM_POSITIONS)
    rows = random_rows(spec, BUDGETS[:num_rows], POSITIONS[-num_rows:], NUM_POSITIONS, SAMPLING[:num_rows])
    if spec.exits:
        for lane, max_cost in zip(rows.lanes, rows.max_costs, strict=True):
            planner.start(lane, max_cost)
    ours, theirs = GpuStepper(model, deepcopy(cache), deepcopy(planner)), TorchStepper(model, cache, planner)
    got, want = ours.step(rows), theirs.step(rows)
    assert tokens_of(got) == tokens_of(want), f"tokens are {tokens_of(got)}, the reference's {tokens_of(want)}"
    check_same("the step's paths", got.paths, want.paths, 1)
    assert len(set(map(tuple, want.paths[0].tolist()))) > 1, "all rows take one path"
    check_same("the sums of V", got.sums.float().cpu(), want.sums.float().cpu(), spec.hidden_size, spec.num_layers)
    return f"{num_rows} rows of {num_rows + 1}, paths {[''.join(map(str, path)) for path in want.paths[0].tolist()]}"


@torch.inference_mode()
def check_calls(device: torch.device) -> str:
    """Tokens and paths of one call, that of NUM_STEPS steps, against those of as many calls."""
    model = random_decoder(spec_of(LLAMA, NUM_POSITIONS), torch.float32, device, SPREAD)
    num_rows, positions = 2, POSITIONS[1:3]
    planner, cache = random_planner(model, num_rows), random_cache(model, num_rows, NUM_POSITIONS)
    rows = random_rows(model.spec, BUDGETS[:num_rows], positions, NUM_POSITIONS, SAMPLING[:num_rows], NUM_STEPS + 1)
    together, apart = (GpuStepper(model, deepcopy(cache), deepcopy(planner)) for _ in range(2))
    # How many steps fit into a call is known after its first.
    first = together.step(single(rows, 0))
    assert tokens_of(first) == tokens_of(apart.step(single(rows, 0))), "two steppers differ"
    rest = replace(after(rows, first), most_s=1e9)
    got = together.step(rest)
    singles = []
    now = rest
    for step in range(NUM_STEPS):
        singles.append(apart.step(single(now, step)))
        now = after(now, singles[-1], drops_uniform=False)
    want = [[tokens_of(output)[row][0] for output in singles] for row in range(num_rows)]
    assert tokens_of(got) == want, f"tokens are {tokens_of(got)}, of single steps {want}"
    check_same("a call's paths", got.paths, torch.cat([output.paths for output in singles]), 1)
    return f"{num_rows} rows, {NUM_STEPS} tokens each"


def tokens_of(output: RoutedOutput) -> list[list[int]]:
    return [[made.token_id for made in of_row] for of_row in output.tokens]


def single(rows: StepRows, step: int) -> StepRows:
    """One step of them, by the numbers of this one."""
    wanted = [replace(one, max_tokens=1, uniforms=one.uniforms[step : step + 1]) for one in rows.wanted]
    return replace(rows, wanted=wanted, most_s=0.0)


def after(rows: StepRows, output: RoutedOutput, drops_uniform: bool = True) -> StepRows:
    """The same rows a token later."""
    wanted: Sequence[Any] = rows.wanted
    if drops_uniform:
        wanted = [replace(one, max_tokens=one.max_tokens - 1, uniforms=one.uniforms[1:]) for one in wanted]
    return replace(
        rows,
        tokens=[of_row[0] for of_row in tokens_of(output)],
        positions=[position + 1 for position in rows.positions],
        path_actions=[PathAction.CHOOSE] * len(rows.lanes),
        wanted=wanted,
    )
