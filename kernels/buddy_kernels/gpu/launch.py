"""How kernels are launched, or written down instead: to compile them for a card that is not there, to count them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of a model's weights and of what it computes."""

Capability = tuple[int, int]
"""A card's compute capability, such as (9, 0)."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that it is given: tensors by place, and by name what its code is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        self.kernel[self.grid](*self.tensors, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True, slots=True)
class _Recording:
    capability: Capability
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("_recording", default=None)


@contextmanager
def recorded(capability: Capability) -> Iterator[list[Launch]]:
    """The launches made inside, which do not run, as they would be on a card of this capability. Tensors may be on the
    device "meta"."""
    recording = _Recording(capability, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *tensors: Tensor | None,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    made = Launch(kernel, grid, tensors, constants, num_warps, num_stages)
    recording = _recording.get()
    if recording is None:
        made.run()
    else:
        recording.launches.append(made)


def capability_of(device: torch.device) -> Capability | None:
    """The device's, or that of the card that launches are recorded for; None for a CPU, where Triton interprets."""
    recording = _recording.get()
    if recording is not None:
        return recording.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
