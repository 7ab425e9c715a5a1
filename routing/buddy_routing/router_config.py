"""`router_config.json` of a router artifact (design section 6), and its allowed values; imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

FORMAT_VERSION = 1
KV_POLICIES = ("project",)
CONFIG_NAME = "router_config.json"

FeatureKind = Literal["mean_v+newest_v", "mean_v"]
"""A router's input from the first layer's V: pooled and newest, or pooled only, as in the paper."""
FEATURES: tuple[FeatureKind, ...] = get_args(FeatureKind)

Indicator = Literal["cosine", "ppl", "taylor", "greedy"]
"""Ways for a static prior to measure the importance of layers."""
INDICATORS: tuple[Indicator, ...] = get_args(Indicator)


class ArtifactError(ValueError):
    """A router artifact that is missing, of an unknown format, or made for another model."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """`base_fingerprint` is the model's (checkpoint.load_model). `prior` names the indicator; the prior's values are in
    the safetensors file."""

    base_fingerprint: str
    num_layers: int
    kv_dim: int
    rank: int
    prior: str
    prior_weight: float
    route_block: int = 128
    reroute_every: int = 1
    kv_policy: str = "project"
    features: FeatureKind = "mean_v+newest_v"
    format_version: int = FORMAT_VERSION


def read_router_config(directory: Path) -> RouterConfig:
    """Raises ArtifactError if the file is missing or contains unsupported values."""
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ArtifactError(f"{directory} is not a router artifact: it has no {CONFIG_NAME}")
    try:
        config = RouterConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    for name, value, allowed in (
        ("format_version", config.format_version, (FORMAT_VERSION,)),
        ("kv_policy", config.kv_policy, KV_POLICIES),
        ("features", config.features, FEATURES),
    ):
        if value not in allowed:
            raise ArtifactError(f"{path}: {name} {value!r} is not supported; allowed: {allowed}")
    for name in ("route_block", "reroute_every", "rank", "num_layers", "kv_dim"):
        if getattr(config, name) < 1:
            raise ArtifactError(f"{path}: {name} is {getattr(config, name)}; allowed is 1 or more")
    return config
