"""Runs a server's steps: decoder, cache and what routing remembers, in plain torch or as the CPU's one op."""

import time
from dataclasses import dataclass
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
    StepRows,
    draw,
)
from buddy_kernels.routed_step import ChoosePaths
from buddy_routing.decoder import DecoderLayer, Linear, RoutedDecoder
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner, Planner
from buddy_routing.router import NEVER, LearnedRouter, StaticRouter
from buddy_routing.segments import SegmentBatch


class Stepper(Protocol):
    """What the engine's runner drives."""

    @property
    def planner(self) -> Planner: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def arithmetic(self) -> str:
        """What products are computed with: one of buddy_kernels.arithmetics, or "torch"."""
        ...

    @property
    def multi_step(self) -> bool:
        """Whether `most_steps` of StepRows may be more than one."""
        ...

    def step(self, rows: StepRows) -> RoutedOutput: ...


@dataclass(slots=True)
class TorchStepper:
    """Any device, any dtype; op by op. The reference."""

    model: RoutedDecoder
    cache: KVCache
    planner: Planner
    arithmetic: str = "torch"

    @property
    def num_layers(self) -> int:
        return self.model.spec.num_layers

    @property
    def multi_step(self) -> bool:
        return False

    @torch.inference_mode()
    def step(self, rows: StepRows) -> RoutedOutput:
        batch = SegmentBatch.from_rows(rows, self.cache.k.device)
        router_s = 0.0
        sums = torch.empty(0)

        def choose(v: Tensor) -> Tensor:
            nonlocal router_s, sums
            started = time.perf_counter()
            masks, sums = self.planner.choose(batch, v)
            router_s = time.perf_counter() - started
            return masks

        logits, masks = self.model(batch, self.cache, choose)
        logits = logits.float().cpu()
        return RoutedOutput(logits, [next_tokens(logits, rows)], masks[None], sums, router_s)


def next_tokens(logits: Tensor, rows: StepRows) -> list[int]:
    """What StepRows says of the wanted rows' logits [W, V]."""
    if not rows.samplings:
        return logits.argmax(-1).tolist()
    drawn = zip(logits, rows.samplings, rows.uniforms, strict=True)
    return [draw(row, sampling, uniforms[0]) for row, sampling, uniforms in drawn]


class NativeStepper:
    """The whole step in C++, with its own packed weights and cache."""

    def __init__(self, routed_step: RoutedStep, planner: PathPlanner) -> None:
        self.routed_step = routed_step
        self.planner = planner
        self.num_layers = routed_step.num_layers
        self.arithmetic = routed_step.arithmetic
        self._router_weights = router_weights(planner)
        # Where choosing and keeping take turns, no two steps are alike.
        self.multi_step = self._router_weights is not None and planner.router.reroute_every in (1, NEVER)

    def step(self, rows: StepRows) -> RoutedOutput:
        return self.routed_step(rows, self._router_weights or self._asking_planner(rows))

    def _asking_planner(self, rows: StepRows) -> ChoosePaths:
        batch = SegmentBatch.from_rows(rows, torch.device("cpu"))
        return torch.inference_mode()(lambda v: self.planner.choose(batch, v))


def router_weights(planner: PathPlanner) -> RouterWeights | None:
    """What the op needs to choose paths itself; None for a router whose way it does not know and asks in Python."""
    router, sums, last_masks = planner.router, planner.features.sums, planner.last_masks
    match router:
        case StaticRouter():
            return RouterWeights(router.prior.float().contiguous(), sums, last_masks)
        case LearnedRouter():
            down, up = (Projection(layer.weight, layer.bias) for layer in (router.decision.down, router.decision.up))
            return RouterWeights(router.prior_weight * router.prior, sums, last_masks, down, up)
        case _:
            return None


def decoder_weights(model: RoutedDecoder) -> DecoderWeights:
    """A decoder's parameters under the names that the op knows."""
    spec = model.spec
    return DecoderWeights(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        mlp_dim=spec.intermediate_size,
        eps=spec.norm_eps,
        attention_factor=model.attention_factor,
        inv_freq=model.inv_freq,
        embeddings=model.embed_tokens.weight,
        layers=[_layer_weights(layer) for layer in model.blocks],
        norm=model.norm.weight,
        head=_projection(model.lm_head),
    )


def _layer_weights(layer: DecoderLayer) -> LayerWeights:
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
    )


def _projection(layer: Linear) -> Projection:
    return Projection(layer.weight, layer.bias)
