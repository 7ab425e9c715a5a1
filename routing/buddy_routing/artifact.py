"""Router artifacts: a directory with `router_config.json`, `router.safetensors` and, if a predictor was trained,
`predictor.safetensors` (design section 6)."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from buddy_routing.action_space import ActionSpace
from buddy_routing.features import feature_dim
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import CONFIG_NAME, ArtifactError, RouterConfig, read_router_config

PREDICTOR_NAME = "predictor.safetensors"


def save_router(directory: Path, router: LearnedRouter, config: RouterConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in router.state_dict().items()}, _weights(directory))
    (directory / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_router(directory: Path, base_fingerprint: str, device: torch.device) -> tuple[LearnedRouter, RouterConfig]:
    """Raises ArtifactError if the artifact is incomplete, of an unknown format, or made for another model."""
    config = read_router_config(directory)
    if not _weights(directory).exists():
        raise ArtifactError(f"{directory} is not a router artifact: it has no {_weights(directory).name}")
    if config.base_fingerprint != base_fingerprint:
        raise ArtifactError(
            f"router {directory} was made for a model with fingerprint {config.base_fingerprint}, "
            f"this model has {base_fingerprint}"
        )
    prior = torch.zeros(len(ActionSpace.skip_or_run(config.num_layers).free))
    decision = DecisionModule(feature_dim(config.kv_dim, config.features), config.num_layers, config.rank)
    digest = hashlib.sha256(_weights(directory).read_bytes()).hexdigest()[:12]
    router = LearnedRouter(decision, prior, config.prior_weight, f"learned:{digest}", config.reroute_every)
    try:
        router.load_state_dict(load_file(_weights(directory)))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{_weights(directory)} does not fit {CONFIG_NAME}: {error}") from error
    return router.to(device).eval().requires_grad_(False), config


def save_predictor(directory: Path, predictor: BudgetPredictor) -> None:
    """Save the predictor next to the router it was trained with."""
    state = {name: t.detach().cpu().contiguous() for name, t in predictor.state_dict().items()}
    save_file(state, directory / PREDICTOR_NAME)


def load_predictor(directory: Path, config: RouterConfig, device: torch.device) -> BudgetPredictor | None:
    """The predictor of an artifact with this config, or None if it has none. Raises ArtifactError."""
    path = directory / PREDICTOR_NAME
    if not path.exists():
        return None
    try:
        state = load_file(path)
        rank, num_features = state["policy.down.weight"].shape
        predictor = BudgetPredictor(num_features, config.num_layers, rank)
        predictor.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} does not fit {CONFIG_NAME}: {error}") from error
    if num_features != feature_dim(config.kv_dim):
        raise ArtifactError(f"{path} expects {num_features} features, {CONFIG_NAME} gives {feature_dim(config.kv_dim)}")
    return predictor.to(device).eval().requires_grad_(False)


def _weights(directory: Path) -> Path:
    return directory / "router.safetensors"
