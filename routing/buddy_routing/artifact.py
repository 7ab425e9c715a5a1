"""Router artifacts: a directory with `router_config.json` and, for a learned router, `router.safetensors`; small FFNs
are in `small_ffns.safetensors`, exits in `exits.safetensors`, and `predictor.safetensors` if a predictor was trained
(design section 6)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from buddy_routing.action_space import ActionSpace
from buddy_routing.decoder import MLP, Exit, RoutedDecoder
from buddy_routing.duo import DuoRouter
from buddy_routing.exits import ExitRouter
from buddy_routing.features import feature_dim
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import (
    CONFIG_NAME,
    ArtifactError,
    DuoConfig,
    ExitsConfig,
    RouterConfig,
    read_duo_config,
    read_exits_config,
    read_router_config,
)

PREDICTOR_NAME = "predictor.safetensors"
EXITS_NAME = "exits.safetensors"
SMALL_FFNS_NAME = "small_ffns.safetensors"


def save_router(directory: Path, router: LearnedRouter, config: RouterConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _save(_weights(directory), router)
    _save_config(directory, config)


def load_router(directory: Path, base_fingerprint: str, device: torch.device) -> tuple[LearnedRouter, RouterConfig]:
    """Raises ArtifactError if the artifact is incomplete, of an unknown format, or made for another model."""
    config = read_router_config(directory)
    _check_base(directory, _weights(directory), config.base_fingerprint, base_fingerprint)
    num_scores = ActionSpace.skip_or_run(config.num_layers).num_scores
    prior = torch.zeros(num_scores)
    decision = DecisionModule(feature_dim(config.kv_dim, config.features), num_scores, config.rank)
    router_id = f"learned:{_digest(_weights(directory))}"
    router = LearnedRouter(decision, prior, config.prior_weight, router_id, config.reroute_every)
    _load(_weights(directory), router)
    return router.to(device), config


def save_duo(directory: Path, router: DuoRouter, config: DuoConfig, dtype: torch.dtype) -> None:
    """`dtype` is that of the small FFNs; the router's is as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    _save(_weights(directory), router.decision)
    _save(directory / SMALL_FFNS_NAME, _by_number(router.small_ffns), dtype)
    _save_config(directory, config, "duo")


def load_duo(directory: Path, model: RoutedDecoder, base_fingerprint: str) -> tuple[DuoRouter, DuoConfig]:
    """The small FFNs are of the dtype of `model`. Raises ArtifactError as `load_router` does."""
    config = read_duo_config(directory)
    for path in (_weights(directory), directory / SMALL_FFNS_NAME):
        _check_base(directory, path, config.base_fingerprint, base_fingerprint)
    if config.small_ffn_size >= model.spec.intermediate_size:
        allowed = f"less than {model.spec.intermediate_size}, the big ones' size"
        raise ArtifactError(
            f"{directory / CONFIG_NAME}: small_ffn_size is {config.small_ffn_size}; allowed is {allowed}"
        )
    small_ffns = {layer: MLP(model.spec, config.small_ffn_size) for layer in range(1, config.num_layers - 1)}
    actions = replace(model.spec, small_ffn_size=config.small_ffn_size).actions
    decision = DecisionModule(feature_dim(config.kv_dim), actions.num_scores, config.rank)
    _load(directory / SMALL_FFNS_NAME, _by_number(small_ffns))
    _load(_weights(directory), decision)
    for mlp in small_ffns.values():
        mlp.to(model.embed_tokens.weight)
    digest = _digest(_weights(directory), directory / SMALL_FFNS_NAME)
    return DuoRouter(decision.to(model.inv_freq.device), small_ffns, f"duo:{digest}", config.reroute_every), config


def save_exits(directory: Path, exits: Mapping[int, Exit], config: ExitsConfig, dtype: torch.dtype) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / EXITS_NAME, _by_number(exits), dtype)
    _save_config(directory, config, "exits")


def load_exits(directory: Path, model: RoutedDecoder, base_fingerprint: str) -> tuple[ExitRouter, ExitsConfig]:
    """The exits of `model`, in its dtype. Raises ArtifactError as `load_router` does."""
    config = read_exits_config(directory)
    path = directory / EXITS_NAME
    _check_base(directory, path, config.base_fingerprint, base_fingerprint)
    try:
        ActionSpace.of_exits(model.spec.num_layers, config.exits)
    except ValueError as error:
        raise ArtifactError(f"{directory / CONFIG_NAME} does not fit the model: {error}") from error
    exits = {num_layers: Exit(model.spec) for num_layers in config.exits}
    _load(path, _by_number(exits))
    for exit_ in exits.values():
        exit_.to(model.embed_tokens.weight)
    return ExitRouter(exits, f"exits:{_digest(path)}"), config


def save_predictor(directory: Path, predictor: BudgetPredictor) -> None:
    """Save the predictor next to the router or the exits it was trained with."""
    state = {name: t.detach().cpu().contiguous() for name, t in predictor.state_dict().items()}
    save_file(state, directory / PREDICTOR_NAME)


def load_predictor(directory: Path, actions: ActionSpace, kv_dim: int, device: torch.device) -> BudgetPredictor | None:
    """The predictor of an artifact whose paths are those of `actions`, or None if it has none. Raises ArtifactError."""
    path = directory / PREDICTOR_NAME
    if not path.exists():
        return None
    try:
        state = load_file(path)
        rank, num_features = state["estimator.down.weight"].shape
        predictor = BudgetPredictor(num_features, state["depths"].tolist(), rank)
        predictor.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is not a Budget Predictor of this version: {error}") from error
    if num_features != feature_dim(kv_dim):
        raise ArtifactError(f"{path} expects {num_features} features, the model gives {feature_dim(kv_dim)}")
    depths = tuple(predictor.depths.tolist())
    if not set(depths) <= set(actions.depths) or depths[-1] != actions.full_cost:
        raise ArtifactError(f"{path} chooses among {depths} milli-layers, {CONFIG_NAME} allows {actions.depths}")
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


def _digest(*weights: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]


def _by_number(modules: Mapping[int, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({str(number): module for number, module in modules.items()})


def _save(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    save_file({name: t.detach().to("cpu", dtype).contiguous() for name, t in module.state_dict().items()}, path)


def _load(path: Path, module: nn.Module) -> None:
    """Raises ArtifactError for a file that has not exactly the module's weights."""
    try:
        state = load_file(path)
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path} does not fit {CONFIG_NAME} and the model: {error}") from error
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ArtifactError(f"{path} has weights that are not finite: {', '.join(broken)}")
    module.eval().requires_grad_(False)


def _save_config(directory: Path, config: RouterConfig | ExitsConfig | DuoConfig, kind: str | None = None) -> None:
    named = {} if kind is None else {"kind": kind}
    (directory / CONFIG_NAME).write_text(json.dumps(named | asdict(config), indent=2) + "\n", encoding="utf-8")
