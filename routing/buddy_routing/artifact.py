"""Router artifacts: a directory with `router_config.json` and `router.safetensors` (design section 6)."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from buddy_routing.router import DecisionModule, LearnedRouter

FORMAT_VERSION = 1
KV_POLICIES = ("project",)
FEATURES = ("mean_v+newest_v",)


class ArtifactError(ValueError):
    """A router artifact that is missing, of an unknown format, or made for another model."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """`router_config.json`. `base_fingerprint` is the model's (checkpoint.load_model), `prior` names the indicator;
    the prior's values are in the safetensors file."""

    base_fingerprint: str
    num_layers: int
    kv_dim: int
    rank: int
    prior: str
    prior_weight: float
    route_block: int = 128
    reroute_every: int = 1
    kv_policy: str = "project"
    features: str = "mean_v+newest_v"
    format_version: int = FORMAT_VERSION


def save_router(directory: Path, router: LearnedRouter, config: RouterConfig) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in router.state_dict().items()}, _weights(directory))
    _config(directory).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_router(directory: Path, base_fingerprint: str, device: torch.device) -> tuple[LearnedRouter, RouterConfig]:
    """Raises ArtifactError when the artifact is incomplete, of an unknown format, or made for another model."""
    config = read_router_config(directory)
    if config.base_fingerprint != base_fingerprint:
        raise ArtifactError(
            f"router {directory} was made for a model with fingerprint {config.base_fingerprint}, "
            f"this model has {base_fingerprint}"
        )
    prior = torch.zeros(config.num_layers - 2)
    decision = DecisionModule(config.kv_dim, config.num_layers, config.rank)
    digest = hashlib.sha256(_weights(directory).read_bytes()).hexdigest()[:12]
    router = LearnedRouter(decision, prior, config.prior_weight, f"learned:{digest}", config.reroute_every)
    try:
        router.load_state_dict(load_file(_weights(directory)))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{_weights(directory)} does not fit {_config(directory).name}: {error}") from error
    return router.to(device).eval().requires_grad_(False), config


def read_router_config(directory: Path) -> RouterConfig:
    """Raises ArtifactError."""
    for path in (_config(directory), _weights(directory)):
        if not path.exists():
            raise ArtifactError(f"{directory} is not a router artifact: it has no {path.name}")
    try:
        config = RouterConfig(**json.loads(_config(directory).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ArtifactError(f"{_config(directory)} cannot be read: {error}") from error
    for name, value, allowed in (
        ("format_version", config.format_version, (FORMAT_VERSION,)),
        ("kv_policy", config.kv_policy, KV_POLICIES),
        ("features", config.features, FEATURES),
    ):
        if value not in allowed:
            raise ArtifactError(f"{_config(directory)}: {name} {value!r} is not supported; allowed: {allowed}")
    for name in ("route_block", "reroute_every", "rank", "num_layers", "kv_dim"):
        if getattr(config, name) < 1:
            raise ArtifactError(f"{_config(directory)}: {name} is {getattr(config, name)}; allowed is 1 or more")
    return config


def _config(directory: Path) -> Path:
    return directory / "router_config.json"


def _weights(directory: Path) -> Path:
    return directory / "router.safetensors"
