"""What an engine is built from, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`kv_cache_gib` bounds the cache; it is smaller when `max_sequences` full contexts need less. A block holds
    `block_size` tokens, a step computes at most `max_step_tokens`. `cost_weight` makes the Budget Predictor choose less
    depth (BudgetPredictor.choose). `native` runs steps on the CPU in C++ where that can be built, with the
    fastest `arithmetic` or the named one (buddy_kernels.arithmetics). `prefix_cache` keeps what prompts of the same
    tenant and depth begin with in the cache as long as there is room."""

    kv_cache_gib: float = 1.0
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
