"""The server's model: a checkpoint without end tokens, and a router; the engine alone uses the same."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from buddy_kernels.arithmetics import AUTO
from buddy_routing.artifact import save_router
from buddy_routing.checkpoint import load_model
from buddy_routing.embedded import MODEL_ID, model_directory
from buddy_routing.router_config import RouterConfig
from buddy_server.bench.ours import random_router
from buddy_server.bench.shapes import save_random_model
from buddy_server.engine.routing import default_router
from buddy_server.engine.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class ServedCheckpoint:
    """`router` in the format of `buddy serve --router`."""

    directory: Path
    router: str


def served_shape(shape: str, work: Path) -> ServedCheckpoint:
    """Random weights and a random router, written under `work`."""
    directory, artifact = work / shape, work / "router"
    save_random_model(shape, directory)
    loaded = load_model(directory, torch.bfloat16, torch.device("cpu"))
    spec = loaded.model.spec
    router = random_router(spec)
    rank = router.decision.down.out_features
    save_router(artifact, router, RouterConfig(loaded.fingerprint, spec.num_layers, spec.kv_dim, rank, "none", 0.0))
    return ServedCheckpoint(directory, str(artifact))


def served_model(model: str | None, router: str | None, work: Path) -> ServedCheckpoint:
    """The files of `model`, linked under `work` without its end tokens, so that answers have the requested length.

    Raises CheckpointError.
    """
    source = model_directory(model)
    directory = work / (MODEL_ID if model is None else source.resolve().name)
    directory.mkdir()
    for path in source.iterdir():
        if path.name in ("config.json", "generation_config.json"):
            config = {**json.loads(path.read_text(encoding="utf-8")), "eos_token_id": None}
            (directory / path.name).write_text(json.dumps(config), encoding="utf-8")
        else:
            (directory / path.name).symlink_to(path.resolve())
    return ServedCheckpoint(directory, default_router(model) if router is None else router)


def write_config(settings: EngineSettings, arithmetic: str, path: Path) -> None:
    """Write a configuration file for `buddy serve` with these sizes and the arithmetic that an engine here chose."""
    sizes = {
        "kv_cache_gib": settings.kv_cache_gib,
        "max_sequences": settings.max_sequences,
        "max_step_tokens": settings.max_step_tokens,
        "arithmetic": AUTO if arithmetic == "torch" else arithmetic,
    }
    path.write_text(yaml.safe_dump({"engine": sizes}), encoding="utf-8")
