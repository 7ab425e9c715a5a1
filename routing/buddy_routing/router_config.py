"""`router_config.json` of a router artifact of any kind (design section 6), and its allowed values; imports no
torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

FORMAT_VERSION = 1
KV_POLICIES = ("project",)
CONFIG_NAME = "router_config.json"

FeatureKind = Literal["mean_v+newest_v", "mean_v"]
"""A router's input from the first layer's V: pooled and newest, or pooled only, as in the paper."""
FEATURES: tuple[FeatureKind, ...] = get_args(FeatureKind)

Indicator = Literal["cosine", "ppl", "taylor", "greedy"]
"""Ways for a static prior to measure the importance of layers."""

INDICATORS: tuple[Indicator, ...] = get_args(Indicator)

RouterKind = Literal["router", "exits", "duo"]
"""What an artifact is. "router": a learned router, also where the config names no kind; "exits"; "duo": small FFNs and
their router."""

Config = TypeVar("Config")


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


@dataclass(frozen=True, slots=True)
class DuoConfig:
    """As RouterConfig, without a prior; `small_ffn_size` is the inner width of the small FFNs."""

    base_fingerprint: str
    num_layers: int
    kv_dim: int
    rank: int
    small_ffn_size: int
    route_block: int = 128
    reroute_every: int = 1
    kv_policy: str = "project"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class ExitsConfig:
    """`exits` are numbers of layers in rising order, as in ActionSpace. A sequence writes K/V only where it runs."""

    base_fingerprint: str
    exits: tuple[int, ...]
    route_block: int = 128
    format_version: int = FORMAT_VERSION


def read_kind(directory: Path) -> RouterKind:
    """Raises ArtifactError if the file is missing or names another kind."""
    kind = _read_fields(directory).get("kind", "router")
    if kind not in get_args(RouterKind):
        allowed = get_args(RouterKind)
        raise ArtifactError(f"{directory / CONFIG_NAME}: kind {kind!r} is not supported; allowed: {allowed}")
    return kind


def read_router_config(directory: Path) -> RouterConfig:
    """Raises ArtifactError if the file is missing, of another kind, or contains unsupported values."""
    config = _read_config(directory, "router", RouterConfig)
    _check_choice(directory, config, "format_version", (FORMAT_VERSION,))
    _check_choice(directory, config, "kv_policy", KV_POLICIES)
    _check_choice(directory, config, "features", FEATURES)
    _check_counts(directory, config, "route_block", "reroute_every", "rank", "num_layers", "kv_dim")
    return config


def read_duo_config(directory: Path) -> DuoConfig:
    """Raises ArtifactError if the file is missing, of another kind, or contains unsupported values."""
    config = _read_config(directory, "duo", DuoConfig)
    _check_choice(directory, config, "format_version", (FORMAT_VERSION,))
    _check_choice(directory, config, "kv_policy", KV_POLICIES)
    counts = ("route_block", "reroute_every", "rank", "num_layers", "kv_dim", "small_ffn_size")
    _check_counts(directory, config, *counts)
    return config


def read_exits_config(directory: Path) -> ExitsConfig:
    """Raises ArtifactError if the file is missing, of another kind, or contains unsupported values."""
    config = _read_config(directory, "exits", ExitsConfig)
    path = directory / CONFIG_NAME
    _check_choice(directory, config, "format_version", (FORMAT_VERSION,))
    _check_counts(directory, config, "route_block")
    exits: object = config.exits
    if not (isinstance(exits, list) and all(type(number) is int for number in exits)):
        raise ArtifactError(f"{path}: exits {exits!r} is not a list of whole numbers")
    return replace(config, exits=tuple(exits))


def _check_choice(directory: Path, config: object, name: str, allowed: Sequence[object]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ArtifactError(f"{directory / CONFIG_NAME}: {name} {value!r} is not supported; allowed: {allowed}")


def _check_counts(directory: Path, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ArtifactError(f"{directory / CONFIG_NAME}: {name} is {value!r}; allowed is 1 or more")


def _read_config(directory: Path, kind: RouterKind, config_type: type[Config]) -> Config:
    fields = _read_fields(directory)
    if (found := fields.pop("kind", "router")) != kind:
        raise ArtifactError(f"{directory} is an artifact of the kind {found!r}; allowed here: {kind!r}")
    try:
        return config_type(**fields)
    except TypeError as error:
        raise ArtifactError(f"{directory / CONFIG_NAME} cannot be read: {error}") from error


def _read_fields(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ArtifactError(f"{directory} is not a router artifact: it has no {CONFIG_NAME}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} cannot be read: it is not a JSON object")
    return fields
