"""Random models and batches for gpu.py: shapes without a checkpoint, rows with budgets of their own."""

# N rows, C columns of a path

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from buddy_kernels import PathAction, Sampling, StepRows, Wanted
from buddy_kernels.gpu.decode_step import DecodeModel
from buddy_kernels.gpu.logit_adjustment import LogitAdjustments
from buddy_kernels.gpu.offline import ModelShape
from buddy_kernels.gpu.row_state import NO_TOKEN, RowState
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.duo import new_small_ffns
from buddy_routing.exits import ExitRouter, new_exits
from buddy_routing.kv_cache import KVCache
from buddy_routing.model_spec import ModelSpec
from buddy_routing.planner import PathPlanner
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.stepper import decoder_weights, router_weights

BLOCK_SIZE = 16
ROPE_THETA = 500_000.0
NORM_EPS = 1e-5


def spec_of(shape: ModelShape, max_context: int) -> ModelSpec:
    return ModelSpec(
        family="qwen2" if shape.has_qkv_bias else "llama",
        num_layers=shape.num_layers,
        hidden_size=shape.dim,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_dim,
        vocab_size=shape.vocab,
        max_context=max_context,
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        rope_scaling=None,
        tie_embeddings=True,
        qkv_bias=shape.has_qkv_bias,
        output_bias=False,
        mlp_bias=False,
        qk_norm=shape.has_qk_norm,
        windows=(shape.window,) * shape.num_layers,
    )


@torch.no_grad()
def random_decoder(spec: ModelSpec, dtype: torch.dtype, device: torch.device, spread: float) -> RoutedDecoder:
    """Weights are made where they stay; norms are around 1."""
    model = RoutedDecoder.empty(spec, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    return model.eval().requires_grad_(False)


def with_actions(model: RoutedDecoder, actions: str) -> RoutedDecoder:
    """The same model: "plain", with "small FFNs", or with "exits"."""
    dtype = model.embed_tokens.weight.dtype
    if actions == "small FFNs":
        small_ffns = new_small_ffns(model, divisor=4)
        model = model.with_small_ffns({layer: mlp.to(dtype) for layer, mlp in small_ffns.items()})
    elif actions == "exits":
        exits = new_exits(model, (1, 2))
        model = model.with_exits({after: exit_.to(dtype) for after, exit_ in exits.items()})
    return model.requires_grad_(False)


def random_planner(model: RoutedDecoder, num_lanes: int) -> PathPlanner:
    """A learned router of random weights; of a model with exits, the one that has nothing to learn."""
    spec, device = model.spec, model.inv_freq.device
    if spec.exits:
        return PathPlanner(ExitRouter({}, "random"), spec, num_lanes, device)
    num_scores = spec.actions.num_scores
    decision = DecisionModule(2 * spec.kv_dim, num_scores).to(device).requires_grad_(False)
    prior = torch.randn(num_scores, device=device)
    planner = PathPlanner(LearnedRouter(decision, prior, 0.3, "random"), spec, num_lanes, device)
    planner.features.sums.normal_()
    return planner


def random_cache(model: RoutedDecoder, num_rows: int, num_positions: int) -> KVCache:
    """A part of its own for each row."""
    num_blocks = num_rows * blocks_of(num_positions)
    cache = KVCache.allocate(model.spec, num_blocks, BLOCK_SIZE, model.embed_tokens.weight.dtype, model.inv_freq.device)
    cache.k.normal_()
    cache.v.normal_()
    return cache


def blocks_of(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


def random_rows(
    spec: ModelSpec,
    budgets: Sequence[float],
    positions: Sequence[int],
    num_positions: int,
    sampling: Sequence[Sampling],
    max_tokens: int = 1,
    aligned: bool = False,
) -> StepRows:
    """A row for each budget, the i-th in lane i and with the i-th part of the cache. Rows of one budget share a path if
    they are `aligned`."""
    num_rows, width = len(budgets), blocks_of(num_positions)
    first_of = {budget: budgets.index(budget) for budget in budgets}
    action = PathAction.KEEP if spec.exits else PathAction.CHOOSE
    uniforms = torch.rand(num_rows, max_tokens, dtype=torch.float64).tolist()
    return StepRows(
        tokens=torch.randint(0, spec.vocab_size, (num_rows,)).tolist(),
        positions=list(positions),
        lengths=[1] * num_rows,
        tables=[list(range(row * width, (row + 1) * width)) for row in range(num_rows)],
        lanes=list(range(num_rows)),
        max_costs=[spec.actions.max_cost(budget) for budget in budgets],
        path_actions=[action] * num_rows,
        wanted=[
            Wanted(row, how, uniform, max_tokens=max_tokens)
            for row, (how, uniform) in enumerate(zip(sampling, uniforms, strict=True))
        ],
        aheads=[0] * num_rows,
        aligned=[first_of[budget] for budget in budgets] if aligned else list(range(num_rows)),
    )


def decode_model(model: RoutedDecoder, planner: PathPlanner, cache: KVCache, num_positions: int) -> DecodeModel:
    router, device = router_weights(planner), cache.k.device
    assert router is not None
    costs, forced, prior = (tensor.to(device) for tensor in (router.costs, router.forced, router.prior))
    router = replace(router, costs=costs, forced=forced, prior=prior)
    return DecodeModel.of(decoder_weights(model), router, cache.k, cache.v, num_positions)


def begin(state: RowState, rows: StepRows) -> None:
    """The rows are the state's first; behind them is nobody."""
    num_rows, device = len(rows.lanes), state.step.device
    how = [wanted.sampling for wanted in rows.wanted]
    left, top_k = [wanted.max_tokens for wanted in rows.wanted], [one.top_k for one in how]
    ints = [rows.tokens, rows.positions, rows.lanes, rows.max_costs, rows.aligned, left, top_k]
    uniforms = [wanted.uniforms[0] for wanted in rows.wanted]
    reals = [[one.temperature for one in how], [one.top_p for one in how], [one.min_p for one in how], uniforms]
    state.ints[:, :num_rows] = torch.tensor(ints, device=device)
    state.reals[:4, :num_rows] = torch.tensor(reals, dtype=torch.float64, device=device)
    state.path_actions[:num_rows] = torch.tensor(rows.path_actions, device=device)
    tables = torch.tensor(rows.tables, device=device)
    state.block_tables[:num_rows, : tables.shape[1]] = tables
    state.end_tokens.fill_(NO_TOKEN)
    state.live.indices[:num_rows] = torch.arange(num_rows, device=device)
    state.live.count.fill_(num_rows)
    state.step.zero_()


def adjustments(num_rows: int, vocab: int, device: torch.device) -> LogitAdjustments:
    """Penalties, bias and masks of every kind."""

    def numbers(low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.rand(num_rows, *shape, dtype=torch.float64, device=device) * (high - low) + low
        return made.to(dtype)

    return LogitAdjustments(
        presence=numbers(-1, 1, dtype=torch.float64),
        frequency=numbers(-1, 1, dtype=torch.float64),
        counts=numbers(0, 3, vocab, dtype=torch.int32),
        bias=numbers(-1, 1, vocab),
        allowed=numbers(1, 256, -(-vocab // 8), dtype=torch.uint8),
    )
