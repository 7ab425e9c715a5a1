"""Training state on disk: weights, optimizers and the step, in one safetensors file written atomically."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer


class OtherTrainingError(ValueError):
    """A training state from another model, other data or other settings."""


def run_name(*settings: object) -> str:
    """Identifies a training by everything that determines its course, so that only the same training is resumed."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def save_training_state(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], step: int, run: str = ""
) -> None:
    """Write `path`, replacing an earlier file only once the new one is complete. `run` comes from `run_name`."""
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in module.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{parameter}.{key}"] = torch.as_tensor(value)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"step": str(step), "run": run})
    partial.replace(path)


def load_training_state(path: Path, module: nn.Module, optimizers: Sequence[Optimizer], run: str = "") -> int:
    """Restore what `save_training_state` wrote and return its step; 0 if there is no file.

    Raises OtherTrainingError if the file is from another run.
    """
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        check_run(path, file.metadata(), run)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        step = int(file.metadata()["step"])
    load_weights(module, tensors)
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, parameter, key = name.split(".", 3)
                state.setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def check_run(path: Path, metadata: Mapping[str, str], run: str) -> None:
    """Raises OtherTrainingError if the `metadata` of a training state is from another run."""
    if run and metadata.get("run") != run:
        raise OtherTrainingError(
            f"{path} is of a training with another model, other data or other settings: "
            "choose another place for the results, or delete it to begin anew"
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the `model.` entries of a training state into `module`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if f"model.{name}" not in tensors:
                raise OtherTrainingError(f"a training state lacks {name}, which this training has: delete it")
            parameter.copy_(tensors[f"model.{name}"])
