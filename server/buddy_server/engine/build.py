"""Puts an engine together: model, router, stepper, KV cache, scheduler."""

import logging
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from buddy_routing.checkpoint import CheckpointError, end_token_ids
from buddy_routing.first_layer import FirstLayer
from buddy_routing.model_spec import ModelSpec, UnsupportedModelError
from buddy_routing.path_source import decoder_for
from buddy_routing.planner import PathPlanner
from buddy_routing.router_config import ArtifactError
from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.constraint import Grammars
from buddy_server.engine.depth_predictor import DepthPredictor
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import EngineInfo
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.routing import Routing, default_router, make_routing
from buddy_server.engine.runner import ModelRunner
from buddy_server.engine.scheduler import Scheduler
from buddy_server.engine.served_model import EngineBuildError, ServedModel, load_served_model
from buddy_server.engine.settings import EngineSettings
from buddy_server.engine.steppers import make_stepper
from buddy_server.version import server_version

log = logging.getLogger(__name__)

BUILD_ERRORS = (EngineBuildError, CheckpointError, UnsupportedModelError, ArtifactError, OSError)
"""What a user can put right; anything else is a bug."""


KEPT_FREE = 0.1
"""Of a GPU's memory, for graphs, prompts and whatever else runs there."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    engine: Engine
    info: EngineInfo
    directory: Path


def build_engine(
    model: str | None, router: str | None, settings: EngineSettings, device: str = "auto", dtype: str = "auto"
) -> BuiltEngine:
    """`model` is a directory or hub id, None the embedded one. `router` is an artifact's directory or "prior:" and an
    indicator; None is the embedded model's own router, for other models "prior:cosine".

    Raises one of BUILD_ERRORS.
    """
    if router is None:
        router = default_router(model)
        if model is not None:
            log.warning("no router given, a static prior measured now chooses the layers", extra={"router": router})
    served = load_served_model(model, router, device, dtype)
    return assemble(served, make_routing(router, served), settings)


def assemble(served: ServedModel, routing: Routing, settings: EngineSettings) -> BuiltEngine:
    """An engine of its own around a model that may be in several. Raises EngineBuildError."""
    model = decoder_for(served.loaded.model, routing.router)
    served = replace(served, loaded=replace(served.loaded, model=model))
    num_blocks = _num_blocks(model.spec, served, settings)
    if num_blocks < 1:
        raise EngineBuildError(
            f"kv_cache_gib {settings.kv_cache_gib} holds no block of {settings.block_size} tokens: it is "
            f"{_cache_bytes(served.device, settings)} bytes, beside the model"
        )
    planner = PathPlanner(routing.router, model.spec, settings.max_sequences, served.device)
    stepper = make_stepper(served, planner, num_blocks, settings)
    scheduler = Scheduler(
        BlockPool(num_blocks, settings.block_size),
        model.spec.actions,
        settings.max_sequences,
        settings.max_step_tokens,
        routing.route_block,
        make_prefix_keys(routing, settings),
        stepper.multi_step,
    )
    info = EngineInfo(
        model_id=served.model_id,
        actions=model.spec.actions,
        vocab_size=model.spec.vocab_size,
        max_context=model.spec.max_context,
        kv_capacity_tokens=num_blocks * settings.block_size,
        max_sequences=settings.max_sequences,
        router_id=routing.router.router_id,
        device=str(served.device),
        dtype=served.dtype_name,
        arithmetic=stepper.arithmetic,
        system_fingerprint=system_fingerprint(
            served.loaded.fingerprint, routing.router.router_id, served.dtype_name, stepper.arithmetic
        ),
        has_predictor=routing.predictor is not None,
    )
    directory = served.loaded.directory
    depth_predictor = None
    if routing.predictor is not None:
        depth_predictor = DepthPredictor(FirstLayer.of(model), routing.predictor, settings.cost_weight)
    end_tokens = end_token_ids(directory)
    grammars = Grammars(served.tokenizer, model.spec.vocab_size, end_tokens)
    engine = Engine(scheduler, ModelRunner(stepper), served.tokenizer, end_tokens, grammars, depth_predictor)
    return BuiltEngine(engine, info, directory)


def system_fingerprint(*parts: str) -> str:
    """Names what the answers are computed with: `parts`, and the version of this server."""
    return f"fp_{sha256(repr((*parts, server_version())).encode()).hexdigest()[:12]}"


def make_prefix_keys(routing: Routing, settings: EngineSettings) -> PrefixKeys | None:
    """None for an engine without a prefix cache."""
    if not settings.prefix_cache:
        return None
    if routing.route_block % settings.block_size:
        fields = {"route_block": routing.route_block, "block_size": settings.block_size}
        log.warning("no prefix cache: a route block is not a whole number of cache blocks", extra=fields)
        return None
    return PrefixKeys(routing.router.router_id, routing.route_block)


def _num_blocks(spec: ModelSpec, served: ServedModel, settings: EngineSettings) -> int:
    block_bytes = 2 * spec.num_columns * spec.kv_dim * served.dtype.itemsize * settings.block_size
    affordable = _cache_bytes(served.device, settings) // block_bytes
    wanted = settings.max_sequences * -(-spec.max_context // settings.block_size)
    return min(affordable, wanted)


def _cache_bytes(device: torch.device, settings: EngineSettings) -> int:
    """Raises EngineBuildError for more than a GPU has free."""
    asked = None if settings.kv_cache_gib == "auto" else int(settings.kv_cache_gib * 2**30)
    if device.type == "cpu":
        return 2**30 if asked is None else asked
    free, total = torch.cuda.mem_get_info(device)
    if asked is not None and asked > free:
        raise EngineBuildError(
            f"kv_cache_gib {settings.kv_cache_gib} is not free on the GPU; allowed: auto, up to {free / 2**30:.1f}"
        )
    return max(0, free - int(KEPT_FREE * total)) if asked is None else asked
