"""Runs a server's steps: decoder, cache and what routing remembers, in plain torch or as the CPU's one op."""

# N rows, S segments, W wanted rows, L layers, V vocabulary, F width of one token's V

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from buddy_kernels import DecoderWeights, LayerWeights, Projection, RoutedOutput, RoutedStep, RouterWeights, StepRows
from buddy_routing.decoder import DecoderLayer, Linear, RoutedDecoder
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner, Planner
from buddy_routing.router import LearnedRouter, StaticRouter
from buddy_routing.segments import SegmentBatch


class Stepper(Protocol):
    """What the engine's runner drives. Batches come on `device`."""

    @property
    def planner(self) -> Planner: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def step(self, batch: SegmentBatch) -> RoutedOutput:
        """Logits [W, V] fp32 on the CPU after the wanted rows, the masks [S, L] that were run, and the sums [S, F] that
        a lane has after each segment, on the device of the planner."""
        ...


@dataclass(slots=True)
class TorchStepper:
    """Any device, any dtype; op by op. The reference."""

    model: RoutedDecoder
    cache: KVCache
    planner: Planner

    @property
    def num_layers(self) -> int:
        return self.model.spec.num_layers

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def step(self, batch: SegmentBatch) -> RoutedOutput:
        router_s = 0.0
        sums = torch.empty(0)

        def choose(v: Tensor) -> Tensor:
            nonlocal router_s, sums
            started = time.perf_counter()
            masks, sums = self.planner.choose(batch, v)
            router_s = time.perf_counter() - started
            return masks

        logits, masks = self.model(batch, self.cache, choose)
        return RoutedOutput(logits.float().cpu(), masks, sums, router_s)


class NativeStepper:
    """The whole step in C++, with its own packed weights and cache."""

    def __init__(self, routed_step: RoutedStep, planner: PathPlanner) -> None:
        self.routed_step = routed_step
        self.planner = planner
        self.device = torch.device("cpu")
        self._router_weights = router_weights(planner)

    @property
    def num_layers(self) -> int:
        return self.routed_step.num_layers

    def step(self, batch: SegmentBatch) -> RoutedOutput:
        rows = StepRows(
            tokens=batch.tokens,
            positions=batch.positions,
            lengths=batch.lengths,
            block_tables=batch.block_tables,
            lanes=torch.tensor(batch.lanes),
            budgets=torch.tensor(batch.budgets),
            reroutes=torch.tensor(batch.reroutes, dtype=torch.uint8),
            wanted=torch.tensor(batch.wanted_rows, dtype=torch.int64),
        )
        return self.routed_step(rows, self._router_weights or (lambda v: self.planner.choose(batch, v)))


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
