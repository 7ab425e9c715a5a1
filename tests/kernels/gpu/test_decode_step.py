"""A step of kernels is a decode step: the same tokens, paths, sums and cache as TorchStepper's; and the host takes no
part in it."""

from dataclasses import replace

import pytest
import torch

from buddy_kernels import PathAction, Sampling, StepRows, Wanted
from buddy_kernels.gpu import attention, decode_step
from buddy_kernels.gpu.blocks import AttentionBlocks
from buddy_kernels.gpu.decode_step import DecodeModel, DecodeStep
from buddy_kernels.gpu.launch import recorded
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments
from buddy_kernels.gpu.row_norm import norm_rows
from buddy_kernels.gpu.row_state import NO_TOKEN, RowState
from buddy_routing.action_space import RUN
from buddy_routing.checkpoint import load_model
from buddy_routing.duo import new_small_ffns
from buddy_routing.exits import ExitRouter, new_exits
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.stepper import TorchStepper, decoder_weights, router_weights
from tiny_models import save_random_model
from tolerances import assert_close

NUM_LIVE, NUM_ROWS, BLOCK_SIZE, TABLE_WIDTH = 5, 8, 16, 4
SAMPLING = Sampling(temperature=0.8, top_p=0.9)
KINDS = ["llama", "llama-duo", "llama-exits", "qwen2-window", "qwen3"]


def tiny_model(kind, device, directory):
    name, _, actions = kind.partition("-")
    save_random_model(kind if kind == "qwen2-window" else name, directory)
    model = load_model(directory, torch.float32, device).model
    if actions == "duo":
        model = model.with_small_ffns(new_small_ffns(model, divisor=4))
    if actions == "exits":
        model = model.with_exits(new_exits(model, (1, 3)))
    return model.requires_grad_(False)


def random_rows(model):
    """Sequences of several lengths; the last keeps its path, at exits all do."""
    spec = model.spec
    positions = [0, 15, 16, 40, 63]
    tables = torch.randperm(NUM_ROWS * TABLE_WIDTH).view(NUM_ROWS, TABLE_WIDTH)[:NUM_LIVE].tolist()
    cheapest, full = spec.actions.smallest_cost, spec.actions.full_cost
    uniforms = torch.rand(NUM_LIVE, dtype=torch.float64).tolist()
    num_choosing = 0 if spec.exits else NUM_LIVE - 1
    return StepRows(
        tokens=torch.randint(0, spec.vocab_size, (NUM_LIVE,)).tolist(),
        positions=positions,
        lengths=[1] * NUM_LIVE,
        tables=tables,
        lanes=[3, 0, 4, 1, 2],
        max_costs=[cheapest, (cheapest + full) // 2, full - 1000, cheapest + 1000, full],
        path_actions=[PathAction.CHOOSE] * num_choosing + [PathAction.KEEP] * (NUM_LIVE - num_choosing),
        wanted=[Wanted(row, SAMPLING, [uniform]) for row, uniform in enumerate(uniforms)],
        aheads=[0] * NUM_LIVE,
        aligned=list(range(NUM_LIVE)),
    )


def a_planner(model, rows, device):
    spec = model.spec
    if spec.exits:
        planner = PathPlanner(ExitRouter(spec.actions, "test"), spec, NUM_LIVE, device)
        for lane, max_cost in zip(rows.lanes, rows.max_costs, strict=True):
            planner.start(lane, max_cost)
    else:
        decision = DecisionModule(2 * spec.kv_dim, spec.actions.num_scores).to(device).requires_grad_(False)
        prior = torch.randn(spec.actions.num_scores, device=device)
        planner = PathPlanner(LearnedRouter(decision, prior, 0.3, "test"), spec, NUM_LIVE, device)
    planner.features.sums.normal_()
    return planner


def state_of(rows, num_columns, device):
    """Behind the live rows is what none may read: a graph has more rows than are live."""
    state = RowState.empty(NUM_ROWS, TABLE_WIDTH, num_columns, device)
    state.ints.fill_(10**6)
    state.block_tables.fill_(10**6)
    state.live.indices.fill_(10**6)
    lasts = [[1] * NUM_LIVE, [0] * NUM_LIVE]  # tokens left, top_k
    ints = [rows.tokens, rows.positions, rows.lanes, rows.max_costs, rows.aligned, *lasts]
    state.ints[:, :NUM_LIVE] = torch.tensor(ints)
    uniforms = [wanted.uniforms[0] for wanted in rows.wanted]
    reals = [[SAMPLING.temperature] * NUM_LIVE, [SAMPLING.top_p] * NUM_LIVE, [SAMPLING.min_p] * NUM_LIVE, uniforms]
    state.reals[:4, :NUM_LIVE] = torch.tensor(reals, dtype=torch.float64)
    state.path_actions[:NUM_LIVE] = torch.tensor(rows.path_actions)
    state.block_tables[:NUM_LIVE] = torch.tensor(rows.tables)
    state.live.indices[:NUM_LIVE] = torch.arange(NUM_LIVE)
    state.live.count.fill_(NUM_LIVE)
    state.end_tokens.fill_(NO_TOKEN)
    state.made.fill_(NO_TOKEN)
    return state


def no_adjustments(vocab_size, device):
    def zeros(*shape, dtype):
        return torch.zeros(NUM_ROWS, *shape, dtype=dtype, device=device)

    return LogitAdjustments(
        zeros(dtype=torch.float64),
        zeros(dtype=torch.float64),
        zeros(vocab_size, dtype=torch.int32),
        zeros(vocab_size, dtype=torch.float32),
        zeros(-(-vocab_size // 8), dtype=torch.uint8).fill_(0xFF),
    )


def random_cache(model, device):
    cache = KVCache.allocate(model.spec, NUM_ROWS * TABLE_WIDTH, BLOCK_SIZE, torch.float32, device)
    cache.k.normal_()
    cache.v.normal_()
    return cache


def a_step(model, rows, planner, cache, device):
    """A step by kernels, its state and its router, with a memory of its own."""
    made = router_weights(planner)
    router = replace(
        made,
        costs=made.costs.to(device),
        forced=made.forced.to(device),
        prior=made.prior.to(device),
        sums=made.sums.clone(),
        last_paths=made.last_paths.clone(),
    )
    own = KVCache(cache.k.clone(), cache.v.clone())
    state = state_of(rows, model.spec.num_columns, device)
    weights = decoder_weights(model)
    of_model = DecodeModel.of(weights, router, own.k, own.v, TABLE_WIDTH * BLOCK_SIZE)
    return DecodeStep(of_model, state, no_adjustments(model.spec.vocab_size, device)), state, router, own


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A context of 64 tokens in four splits of two programs, each of which is a millisecond of Python."""
    monkeypatch.setattr(attention, "attention_blocks", lambda *_: AttentionBlocks(16, 16, 4, 1, 2, 1))


@pytest.mark.parametrize(("kind", "adjusts"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_a_step_of_kernels_is_a_step_of_the_reference(kind, adjusts, device, tmp_path):
    model = tiny_model(kind, device, tmp_path)
    torch.manual_seed(3)
    rows = random_rows(model)
    planner, cache = a_planner(model, rows, device), random_cache(model, device)
    step, state, router, own_cache = a_step(model, rows, planner, cache, device)
    step.logits.fill_(torch.nan)
    step.run(adjusts)
    want = TorchStepper(model, cache, planner).step(rows)
    assert torch.equal(state.ran_paths[0, :NUM_LIVE].cpu(), want.paths[0])
    assert len(set(map(tuple, want.paths[0].tolist()))) > 2
    assert torch.equal(router.last_paths.cpu(), planner.last_paths.cpu())
    depth, width = model.spec.num_layers, model.spec.intermediate_size
    assert_close(router.sums[rows.lanes].cpu().float(), want.sums.cpu().float(), width)
    assert_close(step.logits[:NUM_LIVE].cpu(), want.logits, width, depth)
    assert state.made[0].tolist() == [*(made[0].token_id for made in want.tokens), *[NO_TOKEN] * 3]
    for own, wanted in ((own_cache.k, cache.k), (own_cache.v, cache.v)):
        assert_close(own, wanted, width, depth)
    assert step.logits[NUM_LIVE:].isnan().all()
    assert not state.ran_paths[:, NUM_LIVE:].any()


def test_launches_are_the_same_whatever_paths_rows_take(device, tmp_path):
    model = tiny_model("llama-duo", device, tmp_path)
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        rows = random_rows(model)
        planner, cache = a_planner(model, rows, device), random_cache(model, device)
        step, state, router, _ = a_step(model, rows, planner, cache, device)
        if seed == 2:
            state.live.count.fill_(1)
            router.last_paths.fill_(RUN)
        with recorded((9, 0)) as launches:
            step.run(adjusts=False)
        seen.append([(made.kernel.__name__, made.grid, made.constants, made.num_warps) for made in launches])
    assert seen[0] == seen[1] == seen[2]


READS = {
    "a number": lambda rows: int(rows.count),
    "a condition": lambda rows: bool(rows.count > 0),
    "a copy": lambda rows: rows.indices.cpu(),
    "a copy into": lambda rows: torch.empty(NUM_ROWS, dtype=torch.int32).copy_(rows.indices),
    "a list": lambda rows: rows.indices.tolist(),
    "a search": lambda rows: rows.indices.nonzero(),
    "a mask": lambda rows: rows.indices[rows.indices > 0],
}


@pytest.mark.parametrize("read", [None, *READS])
def test_step_on_tensors_without_values_runs_and_would_not_if_it_read_one(read, monkeypatch, tmp_path):
    """What waits for the device does so to see a value, and here there is none."""
    meta = torch.device("meta")
    model = tiny_model("llama-duo", torch.device("cpu"), tmp_path).to(meta)
    rows = random_rows(model)
    planner, cache = a_planner(model, rows, meta), random_cache(model, meta)
    router = replace(router_weights(planner), costs=torch.empty(6, 3, dtype=torch.int64, device=meta))
    router = replace(router, forced=torch.empty(6, dtype=torch.bool, device=meta))
    of_model = DecodeModel.of(decoder_weights(model), router, cache.k, cache.v, TABLE_WIDTH * BLOCK_SIZE)
    state = RowState.empty(NUM_ROWS, TABLE_WIDTH, 6, meta)
    step = DecodeStep(of_model, state, no_adjustments(97, meta))

    def norm_that_reads(x, weight, eps, listed, out):
        READS[read](listed)
        norm_rows(x, weight, eps, listed, out)

    if read is not None:
        monkeypatch.setattr(decode_step, "norm_rows", norm_that_reads)
    with recorded((9, 0)) as launches:
        if read is None:
            step.run(adjusts=True)
            assert len(launches) > 6 * 7
        else:
            with pytest.raises((RuntimeError, NotImplementedError)):
                step.run(adjusts=True)
