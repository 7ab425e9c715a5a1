"""Which stepper runs an engine's steps: the whole step in C++, captured graphs on a GPU, or plain torch."""

import logging
from pathlib import Path
from typing import get_args

import torch

from buddy_kernels import NativeBuildError, RoutedStep, UnknownArithmeticError, WeightKind
from buddy_kernels.arithmetics import AUTO
from buddy_kernels.routed_step import BLOCK_SIZE as NATIVE_BLOCK_SIZE
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.kv_cache import KVCache
from buddy_routing.planner import PathPlanner
from buddy_routing.stepper import NativeStepper, Stepper, TorchStepper, decoder_weights
from buddy_server.engine.served_model import EngineBuildError, ServedModel
from buddy_server.engine.settings import EngineSettings

log = logging.getLogger(__name__)

WEIGHT_KINDS: dict[str, WeightKind] = {kind: kind for kind in get_args(WeightKind)}


def make_stepper(served: ServedModel, planner: PathPlanner, num_blocks: int, settings: EngineSettings) -> Stepper:
    """The whole step in C++ where a CPU and a compiler allow it, graphs on a GPU, else plain torch. Raises
    EngineBuildError for int8 or an `arithmetic` without the first, and for an arithmetic that this processor has
    not."""
    model, name = served.loaded.model, served.dtype_name
    reason = "which runs on CPUs only"
    try:
        if served.device.type == "cpu":
            return NativeStepper(native_step(model, name, num_blocks, settings), planner)
    except UnknownArithmeticError as error:
        raise EngineBuildError(str(error)) from None
    except NativeBuildError as error:
        reason = str(error)
        log.warning("no native step, plain torch runs instead and is slower", extra={"reason": reason})
    if name == "int8":
        raise EngineBuildError(f"dtype 'int8' needs the native step: {reason}")
    if settings.arithmetic != AUTO:
        raise EngineBuildError(f"arithmetic {settings.arithmetic!r} needs the native step: {reason}")
    cache = KVCache.allocate(model.spec, num_blocks, settings.block_size, served.dtype, served.device)
    return gpu_stepper(model, cache, planner) if served.device.type == "cuda" else TorchStepper(model, cache, planner)


def gpu_stepper(model: RoutedDecoder, cache: KVCache, planner: PathPlanner) -> Stepper:
    """Graphs, or plain torch where Triton or its compiler is missing, a kernel does not fit the card, or the router is
    asked on the host."""
    try:
        # Imports Triton, which comes with torch for CUDA alone.
        from buddy_routing.gpu_stepper import GpuStepper

        return GpuStepper(model, cache, planner)
    except Exception as error:
        # Compilers and captures fail in many ways, and the server is better slow than not there.
        reason = f"{type(error).__name__}: {error}"
    log.warning("no graphs on the GPU, plain torch runs instead and is slower", extra={"reason": reason})
    return TorchStepper(model, cache, planner)


def pin_threads(stepper: Stepper) -> None:
    """For a process that only serves: its steps do not move from processor to processor. By the thread that steps."""
    if isinstance(stepper, NativeStepper):
        stepper.routed_step.pin_threads()
        # torch's own threads would all be where this one is; what is left to torch is small.
        torch.set_num_threads(1)


def native_step(model: RoutedDecoder, dtype_name: str, num_blocks: int, settings: EngineSettings) -> RoutedStep:
    """Raises NativeBuildError, UnknownArithmeticError."""
    if not settings.native:
        raise NativeBuildError("it is switched off")
    if settings.block_size != NATIVE_BLOCK_SIZE:
        raise NativeBuildError(f"it takes blocks of {NATIVE_BLOCK_SIZE} tokens, not {settings.block_size}")
    if dtype_name not in WEIGHT_KINDS:
        raise NativeBuildError(f"it takes {', '.join(WEIGHT_KINDS)}, not {dtype_name}")
    kind = WEIGHT_KINDS[dtype_name]
    return RoutedStep(decoder_weights(model), kind, num_blocks, num_cpus(), settings.arithmetic)


def num_cpus() -> int:
    """Threads that run at the same time: torch's number of them, no more than the cores a container may use."""
    cores = torch.get_num_threads()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        most, period = quota.read_text(encoding="utf-8").split()
        if most != "max":
            cores = min(cores, max(1, int(most) // int(period)))
    return cores
