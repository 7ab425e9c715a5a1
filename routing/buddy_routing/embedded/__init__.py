"""The small chat model that ships inside the package, with its router; MODEL_CARD.md says what it can do."""

from importlib import resources
from pathlib import Path

from buddy_routing.checkpoint import resolve_model

MODEL_ID = "buddy-7m"


def embedded_model() -> Path:
    """Directory of the embedded model, in Hugging Face's format."""
    return Path(str(resources.files(__name__) / "model"))


def model_directory(model: str | None) -> Path:
    """Of a model directory or hub id; None is the embedded model. Raises CheckpointError."""
    return embedded_model() if model is None else resolve_model(model)


def embedded_router() -> Path:
    """Directory of the embedded model's router artifact."""
    return Path(str(resources.files(__name__) / "router"))
