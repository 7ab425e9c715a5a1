"""The settings from which an engine is built, as plain data."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`kv_cache_gib` bounds the cache; it is smaller if `max_sequences` full contexts need less. "auto" is 1, and on a
    GPU most of the memory that the model leaves free. A block holds
    `block_size` tokens, and a step computes at most `max_step_tokens`. `cost_weight` makes the Budget Predictor choose
    less depth (BudgetPredictor.choose). `native` runs CPU steps in C++ where that can be built, with the fastest
    `arithmetic` or the named one (buddy_kernels.arithmetics). `prefix_cache` keeps prompt prefixes in the KV cache for
    later prompts of the same tenant and depth, while there is room."""

    kv_cache_gib: float | Literal["auto"] = "auto"
    block_size: int = 16
    max_sequences: int = 32
    max_step_tokens: int = 512
    cost_weight: float = 0.0
    native: bool = True
    arithmetic: str = "auto"
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The arguments of build_engine (build.py)."""

    model: str | None
    router: str | None
    settings: EngineSettings
    device: str = "auto"
    dtype: str = "auto"

    def with_arithmetic(self, arithmetic: str) -> "EnginePlan":
        """The plan of an engine that computes with this EngineInfo.arithmetic."""
        if arithmetic == "torch":
            return replace(self, settings=replace(self.settings, native=False))
        return replace(self, settings=replace(self.settings, arithmetic=arithmetic))
