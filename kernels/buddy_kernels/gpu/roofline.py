"""Predicts how long a decode step takes on a card, from the launches that the step makes of tensors without values.

A launch costs a fixed time, even if its programs leave at once; one that works also ramps up and ends, and moves its
bytes: weights, K/V and embeddings from memory once, the rows' numbers from the cache once for each program that needs
them. Fewer programs than processors get their share of the bandwidth. What has a chain of steps that wait for each
other (lists, tables, loops over a row) has these added: a program of one row, such as the router's or the draw's,
consists of little else. The time of a step is the sum over its launches; none overlaps with the next.

Not counted: that programs are spread unevenly where there are few for each processor, and what products compute.
"""

# N rows, C columns of a path, V vocabulary

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from torch import Tensor

from buddy_kernels.gpu.blocks import CARDS
from buddy_kernels.gpu.launch import Capability, Launch


@dataclass(frozen=True, slots=True)
class CardSpeed:
    """All that is assumed of a card. Times in seconds."""

    name: str
    capability: Capability
    peak_bytes_per_s: float
    """Of memory, from the data sheet."""
    clock_hz: float
    """The highest, from the data sheet (A100, H100); of a B200 assumed."""
    copy_share: float = 0.9
    """Of the peak, reached by a good copy. Assumed: published copies lie between 0.85 and 0.93."""
    cache_bytes_per_cycle: float = 32
    """Of a processor, from the L2 cache, while all read. Assumed: half of the 64 that one alone is built for."""
    alone_bytes_per_cycle: float = 64
    """Of a processor that reads alone."""
    launch_s: float = 1.3e-6
    """Of a launch in a CUDA graph whose programs leave at once: published for an H100 (Hazy Research, "Look Ma, No
    Bubbles"). Of A100 and B200 assumed to be the same."""
    ramp_s: float = 1.0e-6
    """What a launch that works takes longer besides moving its bytes: from its first program to full speed, two waits
    for memory one after the other included, and from its first end to its last. Assumed."""
    memory_wait_s: float = 0.6e-6
    """For a number in memory, while others read too. Assumed."""
    cache_wait_s: float = 0.2e-6
    """For a number in the L2 cache: 260 cycles have been published for A100 and H100, and what it takes to ask."""
    reduction_s: float = 0.1e-6
    """Of a sum or maximum over a program's threads, or of two numbers found in the L1 cache. Assumed."""
    lanes: int = 128
    """Operations of a processor in a cycle."""

    @property
    def processors(self) -> int:
        return CARDS[self.capability].processors

    @property
    def copy_bytes_per_s(self) -> float:
        return self.peak_bytes_per_s * self.copy_share

    @property
    def cache_bytes_per_s(self) -> float:
        return self.processors * self.cache_bytes_per_cycle * self.clock_hz


CARD_SPEEDS = (
    CardSpeed("A100 80GB", (8, 0), 2.039e12, 1.41e9),
    CardSpeed("H100 SXM", (9, 0), 3.35e12, 1.755e9),
    CardSpeed("B200", (10, 0), 8.0e12, 1.85e9),
)

ROUTER_KERNELS = (
    "_begin_step_kernel",
    "_score_layers_kernel",
    "_choose_paths_kernel",
    "_layer_lists_kernel",
    "_end_step_kernel",
)
"""Of the router and of bookkeeping: what a step has besides the model and the draw."""
DRAW_OPERATIONS = 16
"""For each logit, where the likeliest token is looked for: to a number in order, and the larger of two."""


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """How likely it is that any row runs a column, and how many rows do where any does."""

    chance: float
    num_rows: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the programs of a launch do. `needed_bytes` are weights and K/V, `memory_bytes` all that comes from memory,
    `cache_bytes` the rest; waits, reductions and operations are one program's, one after the other."""

    programs: float
    needed_bytes: float = 0.0
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    memory_waits: float = 0
    cache_waits: float = 0
    reductions: float = 0
    operations: float = 0
    is_of_a_row: bool = False
    """Whether one program does all of a row, and reads alone."""

    def seconds(self, card: CardSpeed) -> float:
        all_bytes = self.memory_bytes + self.cache_bytes
        if self.is_of_a_row:
            moved_s = all_bytes / self.programs / (card.alone_bytes_per_cycle * card.clock_hz)
        else:
            share = min(1.0, self.programs / card.processors)
            moved_s = max(self.memory_bytes / card.copy_bytes_per_s, all_bytes / card.cache_bytes_per_s) / share
        waited_s = self.memory_waits * card.memory_wait_s + self.cache_waits * card.cache_wait_s
        computed_s = self.reductions * card.reduction_s + self.operations / (card.lanes * card.clock_hz)
        return card.launch_s + card.ramp_s + moved_s + waited_s + computed_s


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """Of one decode step. `needed_bytes` and `memory_bytes` as in Load, `router_s` of ROUTER_KERNELS."""

    seconds: float
    num_launches: int
    needed_bytes: float
    memory_bytes: float
    router_s: float
    seconds_of: dict[str, float]
    """By kernel."""


def column_uses(num_layers: int, depths: Sequence[int], aligned: bool) -> list[ColumnUse]:
    """[C], for rows that run `depths` layers each: the first, the last, and of the others as many as that leaves, any
    with the same chance. Each row runs its own, or all `aligned` rows of one depth the same."""
    groups = [(depth, count) for depth, count in Counter(depths).items()]
    if not aligned:
        groups = [(depth, 1) for depth in depths]
    chances = [(depth - 2) / (num_layers - 2) for depth, _ in groups]
    chance = 1 - prod(1 - of_group for of_group in chances)
    num_rows = sum(of_group * count for of_group, (_, count) in zip(chances, groups, strict=True))
    always = ColumnUse(1.0, len(depths))
    between = ColumnUse(chance, num_rows / chance if chance else 0.0)
    return [always, *[between] * (num_layers - 2), always]


def predict(launches: Sequence[Launch], uses: Sequence[ColumnUse], context: int, card: CardSpeed) -> StepPrediction:
    """Of a step's launches, where rows use columns so, each with `context` tokens of K/V, its newest included, and
    tokens are drawn greedily.

    Raises:
        ValueError: a launch's kernel is not one of a step without small FFNs and exits.
    """
    counts = next(_given(made)["counts"] for made in launches if _name(made) == "_layer_lists_kernel")
    seconds: defaultdict[str, float] = defaultdict(float)
    needed = memory = 0.0
    for made in launches:
        column = _column(made, counts)
        use = ColumnUse(1.0, uses[0].num_rows) if column is None else uses[column]
        for chance, num_running in ((use.chance, use.num_rows), (1 - use.chance, 0.0)):
            load = _load(made, num_running, uses[0].num_rows, context)
            seconds[_name(made)] += chance * (card.launch_s if load is None else load.seconds(card))
            if load is not None:
                needed += chance * load.needed_bytes
                memory += chance * load.memory_bytes
    router_s = sum(seconds[name] for name in ROUTER_KERNELS)
    return StepPrediction(sum(seconds.values()), len(launches), needed, memory, router_s, dict(seconds))


def _name(launch: Launch) -> str:
    return str(launch.kernel.__name__)


def _given(launch: Launch) -> dict[str, Tensor]:
    """Its tensors by the kernel's names; those that are there."""
    named = zip(launch.kernel.arg_names, launch.tensors, strict=False)
    return {name: tensor for name, tensor in named if tensor is not None}


def _column(launch: Launch, counts: Tensor) -> int | None:
    """The column whose rows the launch works on; None if it works on all rows that are live."""
    given = _given(launch)
    if "actions" in given:
        return int(given["actions"].storage_offset())
    count = given.get("running_count", given.get("count"))
    # Views know their base only outside of inference mode.
    if count is None or count.untyped_storage()._cdata != counts.untyped_storage()._cdata:
        return None
    return int(count.storage_offset()) % counts.shape[1]


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _load(launch: Launch, num_running: float, num_rows: float, context: int) -> Load | None:
    """What a launch does where so many rows run its column; None if its programs leave at once."""
    given = _given(launch)
    match _name(launch):
        case "_row_linear_kernel" | "_row_swiglu_kernel" | "_row_qkv_kernel":
            return _product_load(launch, num_running, num_rows)
        case "_attend_kernel":
            return _attention_load(launch, num_running, num_rows, context)
        case "_norm_rows_kernel":
            if not num_running:
                return None
            weights = _bytes(given["weight"])
            return Load(
                num_running,
                memory_bytes=weights,
                cache_bytes=num_running * (weights + 2 * _bytes(given["x"][0])) - weights,
                memory_waits=1,
                cache_waits=1,
                reductions=1,
                is_of_a_row=True,
            )
        case _:
            return _row_load(launch, num_rows)


def _row_load(launch: Launch, num_rows: float) -> Load:
    """Of the kernels that each row goes through once in a step."""
    given, sizes = _given(launch), launch.constants
    match _name(launch):
        case "_begin_step_kernel":
            moved = num_rows * _bytes(given["h"][0], given["cos"][0], given["sin"][0])
            return Load(
                num_rows, memory_bytes=moved, cache_bytes=moved, memory_waits=1, cache_waits=1, is_of_a_row=True
            )
        case "_score_layers_kernel":
            router = _bytes(*(given.get(name) for name in ("down", "down_bias", "up", "up_bias", "prior")))
            blocks = ceil(sizes["WIDTH"] / sizes["BLOCK_FEATURES"])
            return Load(
                num_rows,
                memory_bytes=router,
                cache_bytes=num_rows * (router + 2 * _bytes(given["sums"][0])) - router,
                memory_waits=blocks + 1,
                cache_waits=1,
                reductions=2 * blocks + 1,
                is_of_a_row=True,
            )
        case "_choose_paths_kernel":
            moved = num_rows * _bytes(given["scores"][0], given["costs"], given["forced"])
            steps = 2 + num_rows + 2 * sizes["BLOCK"]
            return Load(num_rows, cache_bytes=moved, cache_waits=4, reductions=steps, is_of_a_row=True)
        case "_layer_lists_kernel":
            return Load(prod(launch.grid), cache_bytes=_bytes(given["paths"]) * 3, cache_waits=1, reductions=2)
        case "_draw_tokens_kernel":
            blocks = ceil(sizes["VOCAB"] / sizes["BLOCK"])
            moved = num_rows * _bytes(given["logits"][0])
            operations = sizes["VOCAB"] * DRAW_OPERATIONS
            return Load(
                num_rows,
                cache_bytes=moved,
                cache_waits=blocks,
                reductions=blocks,
                operations=operations,
                is_of_a_row=True,
            )
        case "_end_step_kernel":
            return Load(1, cache_bytes=_bytes(given["paths"]), cache_waits=2, reductions=3, is_of_a_row=True)
        case name:
            raise ValueError(f"kernel {name} has no prediction")


def _product_load(launch: Launch, num_running: float, num_rows: float) -> Load | None:
    """Weights once from memory; the rows that are multiplied from the cache, for each program."""
    given, sizes = _given(launch), launch.constants
    of_row, outputs = _bytes(given["x"][0]), sizes["BLOCK_OUTPUTS"]
    if _name(launch) == "_row_qkv_kernel":
        num_q, num_kv = (ceil(sizes[f"{name}_OUTPUTS"] / outputs) for name in ("Q", "KV"))
        weights = _bytes(*(given.get(name) for name in ("k", "v", "k_bias", "v_bias")))
        weights += _bytes(given["q"], given.get("q_bias")) if num_running else 0
        q_programs = num_q if num_running else 0
        programs, read_rows = 2 * num_kv + q_programs, 2 * num_kv * num_rows + q_programs * num_running
        made = num_rows * 2 * _bytes(given["k_out"][0]) + num_running * _bytes(given["q_out"][0])
    elif num_running:
        weights = _bytes(*(given.get(name) for name in ("weight", "bias", "gate", "up", "gate_bias", "up_bias")))
        programs = launch.grid[0]
        read_rows = programs * num_running
        made = num_running * _bytes(given["out"][0]) * (2 if sizes.get("ADDS") else 1)
    else:
        return None
    has_norm = "norm" in given
    norm_bytes = programs * (of_row + _bytes(given["norm"])) if has_norm else 0
    cached = read_rows * of_row + made + norm_bytes
    return Load(
        programs,
        needed_bytes=weights,
        memory_bytes=weights,
        cache_bytes=cached,
        cache_waits=int(has_norm),
        reductions=int(has_norm),
    )


def _attention_load(launch: Launch, num_running: float, num_rows: float, context: int) -> Load:
    """K/V of the rows that run the layer, from memory; the rows that skip it write theirs. The last program of each
    context counts itself, then reads the parts of all."""
    given, sizes = _given(launch), launch.constants
    of_token = 2 * sizes["KV_HEADS"] * sizes["HEAD_DIM"] * given["cache_k"].element_size()
    written = num_rows * of_token
    if not num_running:
        return Load(num_rows * sizes["KV_HEADS"], memory_bytes=written, cache_bytes=written, cache_waits=2)
    num_splits, blocks = _splits(launch, context)
    seen = context if sizes["WINDOW"] is None else min(context, sizes["WINDOW"])
    read = num_running * seen * of_token
    queries = num_running * _bytes(given["q"][0])
    parts = num_running * num_splits * _bytes(given["parts"][0, :, 0])
    programs = num_running * sizes["KV_HEADS"] * min(sizes["PROGRAMS"], num_splits)
    rounds = ceil(num_splits / sizes["PROGRAMS"]) * blocks
    return Load(
        programs,
        needed_bytes=read,
        memory_bytes=read + written,
        cache_bytes=queries + 2 * parts,
        cache_waits=3 + 3,
        reductions=2 * rounds + 1,
    )


def _splits(launch: Launch, context: int) -> tuple[int, int]:
    """How many splits a context has, and the blocks of one, as the kernels have it."""
    sizes = launch.constants
    first = 0 if sizes["WINDOW"] is None else max(context - sizes["WINDOW"], 0) // sizes["BLOCK_CONTEXT"]
    num_blocks = (context - 1) // sizes["BLOCK_CONTEXT"] + 1 - first
    per_split = max(ceil(num_blocks / sizes["SPLITS"]), sizes["MIN_BLOCKS"])
    return ceil(num_blocks / per_split), per_split
