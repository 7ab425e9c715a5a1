"""Loads and saves models in Hugging Face's format, and computes the fingerprint that ties a router to a model."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.model_spec import ModelSpec

FINGERPRINT_SAMPLES = 64


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or does not match the shapes in its config."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and the directory of its tokenizer and config."""

    model: RoutedDecoder
    directory: Path
    fingerprint: str


def resolve_model(path_or_id: str) -> Path:
    """The directory of a model: a local path unchanged, a hub id through Hugging Face's cache.

    Raises CheckpointError naming `path_or_id` if neither exists.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path_or_id.count("/") != 1:
        raise CheckpointError(f"model {path_or_id!r} is neither a directory nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        # Duplicates of the weights in the publisher's own layout.
        unwanted = ["consolidated*", "original/*"]
        return Path(snapshot_download(path_or_id, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        raise CheckpointError(f"model {path_or_id!r} is not a directory and could not be fetched: {error}") from error


def end_token_ids(directory: Path) -> frozenset[int]:
    """The tokens that end an answer, possibly several, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Load config and weights; tensors are cast to `dtype` one at a time.

    Raises CheckpointError, or UnsupportedModelError for an architecture we cannot serve.
    """
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} has no config.json; it is not a Hugging Face model directory")
    spec = ModelSpec.from_pretrained(directory)
    model = RoutedDecoder.empty(spec, dtype, device)
    wanted = dict(model.named_parameters())
    missing = set(wanted)
    digest = hashlib.sha256(f"v1:{spec.family}:{spec.norm_eps}:{spec.rope_theta}".encode())
    with torch.no_grad():
        for name, tensor in sorted_tensors(directory):
            own_name = name.removeprefix("model.")
            if own_name == "lm_head.weight" and spec.tie_embeddings:
                continue
            if own_name.endswith("rotary_emb.inv_freq"):
                continue
            if own_name not in wanted:
                raise CheckpointError(f"{directory} holds {name}, which a {spec.family} model does not have")
            if tensor.shape != wanted[own_name].shape:
                raise CheckpointError(
                    f"{name} has shape {list(tensor.shape)}, config.json asks for {list(wanted[own_name].shape)}"
                )
            wanted[own_name].copy_(tensor)
            missing.discard(own_name)
            _update_digest(digest, name, tensor)
    if missing:
        raise CheckpointError(f"{directory} lacks {len(missing)} tensors, {min(missing)} among them")
    return LoadedModel(model.eval().requires_grad_(False), directory, digest.hexdigest()[:32])


def sorted_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a directory's safetensors files, sharded or not, in order of name."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (directory / "model.safetensors").exists():
        path = directory / "model.safetensors"
        with _reading(path), safe_open(path, framework="pt") as file:
            shards = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise CheckpointError(f"{directory} has no model.safetensors; other weight formats are not loaded")
    opened = {}
    for name in sorted(shards):
        shard = shards[name]
        if shard not in opened:
            if not (directory / shard).exists():
                raise CheckpointError(f"{directory} lacks the shard {shard} that its index names")
            with _reading(directory / shard):
                opened[shard] = safe_open(directory / shard, framework="pt")
        with _reading(directory / shard):
            tensor = opened[shard].get_tensor(name)
        yield name, tensor


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Hashes a few evenly spread values of every tensor: fast at any size, and any fine-tuning changes some of them."""
    flat = tensor.flatten()
    sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].contiguous()
    digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())


def save_model(model: RoutedDecoder, config: object, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors in a form that transformers loads directly.

    `config` is the transformers config from which the model's spec was read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)  # type: ignore[attr-defined]
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
