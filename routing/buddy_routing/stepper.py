"""Runs a server's steps: decoder, cache and routing state, in plain torch or as a single op on the CPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from buddy_kernels import (
    DecoderWeights,
    LayerWeights,
    Projection,
    RoutedOutput,
    RoutedStep,
    RouterWeights,
    SampledToken,
    StepRows,
    Wanted,
    draw,
)
from buddy_kernels.routed_step import ChoosePaths
from buddy_kernels.sampling import adjusted, with_logprobs
from buddy_routing.decoder import MLP, DecoderLayer, Linear, RMSNorm, RoutedDecoder
from buddy_routing.exits import ExitRouter
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner, Planner
from buddy_routing.router import FIXED, NEVER, LearnedRouter, StaticRouter
from buddy_routing.segments import SegmentBatch

LaunchNext = Callable[[Sequence[Sequence[int]], Sequence[Sequence[float]]], "StepCall"]
"""Launches as many steps again, of the same rows: their block tables, and the uniforms of their next tokens."""


class StepCall(Protocol):
    """Steps under way."""

    @property
    def num_steps(self) -> int:
        """How many there are at most."""
        ...

    @property
    def launch_next(self) -> LaunchNext | None:
        """None unless the same rows can go on before these steps are collected."""
        ...

    def collect(self) -> RoutedOutput:
        """Wait for the steps."""
        ...


class Stepper(Protocol):
    """The interface through which the engine's runner runs steps."""

    @property
    def planner(self) -> Planner: ...

    @property
    def arithmetic(self) -> str:
        """What products are computed with: one of buddy_kernels.arithmetics, or "torch"."""
        ...

    @property
    def multi_step(self) -> bool:
        """Whether one call may run several steps."""
        ...

    def step(self, rows: StepRows) -> RoutedOutput: ...

    def launch(self, rows: StepRows) -> StepCall:
        """Begin a step, or several."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """A call of a stepper that returns when all is done."""

    output: RoutedOutput
    launch_next: None = None

    @property
    def num_steps(self) -> int:
        return len(self.output.paths)

    def collect(self) -> RoutedOutput:
        return self.output


@dataclass(slots=True)
class TorchStepper:
    """The reference, op by op, for any device and dtype."""

    model: RoutedDecoder
    cache: KVCache
    planner: Planner
    arithmetic: str = "torch"

    @property
    def multi_step(self) -> bool:
        return False

    def launch(self, rows: StepRows) -> FinishedCall:
        return FinishedCall(self.step(rows))

    @torch.inference_mode()
    def step(self, rows: StepRows) -> RoutedOutput:
        batch = SegmentBatch.from_rows(rows, self.cache.k.device)
        router_s = 0.0
        sums = torch.empty(0)

        def choose(v: Tensor) -> Tensor:
            nonlocal router_s, sums
            started = time.perf_counter()
            paths, sums = self.planner.choose(batch, v)
            router_s = time.perf_counter() - started
            return paths

        logits, paths = self.model(batch, self.cache, choose)
        # While the device computes.
        allowed = [None if wanted.constraint is None else wanted.constraint.allowed() for wanted in rows.wanted]
        logits = logits.float().cpu()
        tokens = [[next_token(*row)] for row in zip(logits, rows.wanted, allowed, strict=True)]
        return RoutedOutput(tokens, paths[None], sums, logits, router_s)


def next_token(logits: Tensor, wanted: Wanted, allowed: bytearray | None) -> SampledToken:
    """The token sampled from, or given for, a wanted row's logits [V]. Its constraint takes it."""
    token = wanted.given
    if token is None:
        given = adjusted(logits, wanted.sampling, wanted.counts, allowed)
        token = draw(given, wanted.sampling, wanted.uniforms[0] if wanted.uniforms else 0.0)
        if wanted.constraint is not None:
            wanted.constraint.accept(token)
    return SampledToken(token) if wanted.num_likeliest is None else with_logprobs(logits, token, wanted.num_likeliest)


class NativeStepper:
    """The whole step in C++, with separately packed weights and cache."""

    def __init__(self, routed_step: RoutedStep, planner: PathPlanner) -> None:
        self.routed_step = routed_step
        self.planner = planner
        self.arithmetic = routed_step.arithmetic
        self._router_weights = router_weights(planner)
        # If some steps choose paths and others keep them, a multi-step call cannot treat its steps alike.
        self.multi_step = self._router_weights is not None and planner.router.reroute_every in (1, FIXED, NEVER)

    def launch(self, rows: StepRows) -> FinishedCall:
        return FinishedCall(self.step(rows))

    def step(self, rows: StepRows) -> RoutedOutput:
        return self.routed_step(rows, self._router_weights or self._asking_planner(rows))

    def _asking_planner(self, rows: StepRows) -> ChoosePaths:
        batch = SegmentBatch.from_rows(rows, torch.device("cpu"))
        return torch.inference_mode()(lambda v: self.planner.choose(batch, v))


def router_weights(planner: PathPlanner) -> RouterWeights | None:
    """What the op needs to choose paths itself; None for a type of router it does not support, which runs in Python."""
    actions = planner.actions
    # Where a layer has fewer actions, its last cost fills the row; nobody takes these.
    costs = [[*of_column, *of_column[-1:] * (actions.num_actions - len(of_column))] for of_column in actions.costs]
    choice = RouterWeights(
        prior=torch.empty(0),
        costs=torch.tensor(costs, dtype=torch.int64),
        forced=torch.tensor([layer in actions.forced for layer in range(actions.num_columns)]),
        sums=planner.features.sums,
        last_paths=planner.last_paths,
    )
    match planner.router:
        case StaticRouter() as router:
            return replace(choice, prior=router.prior.float().contiguous())
        case ExitRouter():
            # Not read: every segment keeps its path.
            return replace(choice, prior=torch.zeros(len(actions.free)))
        case LearnedRouter() as router:
            down, up = (Projection(layer.weight, layer.bias) for layer in (router.decision.down, router.decision.up))
            return replace(choice, prior=router.prior_weight * router.prior, down=down, up=up)
        case _:
            return None


def decoder_weights(model: RoutedDecoder) -> DecoderWeights:
    """A decoder's parameters under the op's names."""
    spec = model.spec
    layers = [
        _layer_weights(layer, writes_all=index == 0 or not spec.exits, small=model.small_ffn(index))
        for index, layer in enumerate(model.blocks)
    ]
    exits = [_layer_weights(exit_.layer, writes_all=False, exit_norm=exit_.norm) for exit_ in model.exit_modules]
    return DecoderWeights(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        mlp_dim=spec.intermediate_size,
        eps=spec.norm_eps,
        attention_factor=model.attention_factor,
        inv_freq=model.inv_freq,
        embeddings=model.embed_tokens.weight,
        layers=[*layers, *exits],
        norm=model.norm.weight,
        head=_projection(model.lm_head),
    )


def _layer_weights(
    layer: DecoderLayer, writes_all: bool, exit_norm: RMSNorm | None = None, small: MLP | None = None
) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        q=_projection(attention.q_proj),
        k=_projection(attention.k_proj),
        v=_projection(attention.v_proj),
        o=_projection(attention.o_proj),
        gate=_projection(mlp.gate_proj),
        up=_projection(mlp.up_proj),
        down=_projection(mlp.down_proj),
        q_norm=attention.q_norm.weight if attention.qk_norm else None,
        k_norm=attention.k_norm.weight if attention.qk_norm else None,
        window=attention.window,
        writes_all=writes_all,
        exit_norm=None if exit_norm is None else exit_norm.weight,
        small_gate=None if small is None else _projection(small.gate_proj),
        small_up=None if small is None else _projection(small.up_proj),
        small_down=None if small is None else _projection(small.down_proj),
    )


def _projection(layer: Linear) -> Projection:
    return Projection(layer.weight, layer.bias)
