"""The model that an engine serves: its weights on a device, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from buddy_routing.adapter import ADAPTER_DIR, merge_adapter
from buddy_routing.checkpoint import LoadedModel, load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.embedded import MODEL_ID, model_directory
from buddy_routing.model_spec import ModelSpec

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
}


class EngineBuildError(ValueError):
    """An engine that cannot be built as asked; the message names the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and its tokenizer, as the tokenizers library has it, for incremental detokenization. `dtype_name` is that
    of the weights that are run: "int8" ones are made of bfloat16."""

    model_id: str
    loaded: LoadedModel
    tokenizer: Tokenizer
    dtype_name: str

    @property
    def device(self) -> torch.device:
        return self.loaded.model.inv_freq.device

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.embed_tokens.weight.dtype


def load_served_model(model: str | None, router: str | None, device: str = "auto", dtype: str = "auto") -> ServedModel:
    """`model` as in build_engine, and what that raises. An adapter in the artifact `router` is merged into it."""
    where, dtype_name = resolve_device(device), resolve_dtype(dtype)
    directory = model_directory(model)
    if where.type == "cuda":
        check_fits(directory, dtype_name, torch.cuda.mem_get_info(where)[0])
    loaded = load_model(directory, DTYPES[dtype_name], where)
    if router is not None and not router.startswith("prior:"):
        adapter = Path(router).expanduser() / ADAPTER_DIR
        if adapter.exists():
            merge_adapter(loaded.model, adapter)
    model_id = MODEL_ID if model is None else _model_id(model, directory)
    return ServedModel(model_id, loaded, load_tokenizer(directory), dtype_name)


def check_fits(directory: Path, dtype_name: str, free_bytes: int) -> None:
    """Raises EngineBuildError for a model whose weights take more than `free_bytes`, and what ModelSpec does."""
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in RoutedDecoder(ModelSpec.from_pretrained(directory)).parameters())
    itemsize = DTYPES[dtype_name].itemsize
    if num_weights * itemsize > free_bytes:
        raise EngineBuildError(
            f"model {directory.name} takes {num_weights * itemsize / 2**30:.1f} GiB in {dtype_name}, "
            f"{free_bytes / 2**30:.1f} GiB of the GPU are free; allowed in {dtype_name}: up to "
            f"{free_bytes / itemsize / 1e9:.1f} billion weights, this model has {num_weights / 1e9:.1f}"
        )


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU when there is one. Raises EngineBuildError."""
    if name not in ("auto", "cpu", "cuda"):
        raise EngineBuildError(f"device {name!r} is unknown; allowed: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineBuildError("device 'cuda' is not available here; allowed: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str) -> str:
    """ "auto" is bfloat16. Raises EngineBuildError."""
    if name == "auto":
        return "bfloat16"
    if name not in DTYPES:
        raise EngineBuildError(f"dtype {name!r} is unknown; allowed: auto, {', '.join(DTYPES)}")
    return name


def load_tokenizer(directory: Path) -> Tokenizer:
    """The model's tokenizer as the tokenizers library has it."""
    from transformers import AutoTokenizer

    backend: Tokenizer = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    return backend


def _model_id(model: str, directory: Path) -> str:
    return directory.resolve().name if Path(model).expanduser().is_dir() else model
