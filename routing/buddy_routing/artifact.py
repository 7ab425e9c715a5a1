"""Router artifacts: a directory with `router_config.json` and, for a learned router, `router.safetensors` and, if a
predictor was trained, `predictor.safetensors` (design section 6); for exits, `exits.safetensors`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from buddy_routing.action_space import ActionSpace
from buddy_routing.decoder import Exit, RoutedDecoder
from buddy_routing.exits import ExitRouter
from buddy_routing.features import feature_dim
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import (
    CONFIG_NAME,
    ArtifactError,
    ExitsConfig,
    RouterConfig,
    read_exits_config,
    read_router_config,
)

PREDICTOR_NAME = "predictor.safetensors"
EXITS_NAME = "exits.safetensors"


def save_router(directory: Path, router: LearnedRouter, config: RouterConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in router.state_dict().items()}, _weights(directory))
    (directory / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_router(directory: Path, base_fingerprint: str, device: torch.device) -> tuple[LearnedRouter, RouterConfig]:
    """Raises ArtifactError if the artifact is incomplete, of an unknown format, or made for another model."""
    config = read_router_config(directory)
    _check_base(directory, _weights(directory), config.base_fingerprint, base_fingerprint)
    num_scores = ActionSpace.skip_or_run(config.num_layers).num_scores
    prior = torch.zeros(num_scores)
    decision = DecisionModule(feature_dim(config.kv_dim, config.features), num_scores, config.rank)
    router_id = f"learned:{_digest(_weights(directory))}"
    router = LearnedRouter(decision, prior, config.prior_weight, router_id, config.reroute_every)
    try:
        router.load_state_dict(load_file(_weights(directory)))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{_weights(directory)} does not fit {CONFIG_NAME}: {error}") from error
    return router.to(device).eval().requires_grad_(False), config


def save_exits(directory: Path, exits: Mapping[int, Exit], config: ExitsConfig, dtype: torch.dtype) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    modules = nn.ModuleDict({str(num_layers): exit_ for num_layers, exit_ in exits.items()})
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in modules.state_dict().items()}
    save_file(state, directory / EXITS_NAME)
    text = json.dumps({"kind": "exits", **asdict(config)}, indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_exits(directory: Path, model: RoutedDecoder, base_fingerprint: str) -> tuple[ExitRouter, ExitsConfig]:
    """The exits of `model`, in its dtype. Raises ArtifactError as `load_router` does."""
    config = read_exits_config(directory)
    path = directory / EXITS_NAME
    _check_base(directory, path, config.base_fingerprint, base_fingerprint)
    try:
        ActionSpace.of_exits(model.spec.num_layers, config.exits)
        state = load_file(path)
        exits = nn.ModuleDict({str(num_layers): Exit(model.spec) for num_layers in config.exits})
        exits.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path} does not fit {CONFIG_NAME} and the model: {error}") from error
    exits.to(model.embed_tokens.weight).eval().requires_grad_(False)
    made = {num_layers: cast(Exit, exits[str(num_layers)]) for num_layers in config.exits}
    return ExitRouter(made, f"exits:{_digest(path)}"), config


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


def _check_base(directory: Path, weights: Path, made_for: str, base_fingerprint: str) -> None:
    if not weights.exists():
        raise ArtifactError(f"{directory} is not a router artifact: it has no {weights.name}")
    if made_for != base_fingerprint:
        raise ArtifactError(
            f"router {directory} was made for a model with fingerprint {made_for}, this model has {base_fingerprint}"
        )


def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
