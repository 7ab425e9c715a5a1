"""The small chat model in the package, with its router, exits and small FFNs; MODEL_CARD.md describes its abilities."""

from importlib import resources
from pathlib import Path

from buddy_routing.checkpoint import resolve_model

MODEL_ID = "buddy-7m"


def embedded_model() -> Path:
    """The directory of the embedded model, in Hugging Face's format."""
    return Path(str(resources.files(__name__) / "model"))


def model_directory(model: str | None) -> Path:
    """The directory of a model path or hub id; None is the embedded model. Raises CheckpointError."""
    return embedded_model() if model is None else resolve_model(model)


def embedded_router() -> Path:
    """The directory of the embedded model's router artifact."""
    return Path(str(resources.files(__name__) / "router"))


def embedded_exits() -> Path:
    """The directory of the embedded model's exits."""
    return Path(str(resources.files(__name__) / "exits"))


def embedded_duo() -> Path:
    """The directory of the embedded model's small FFNs and their router."""
    return Path(str(resources.files(__name__) / "duo"))
