"""The architecture of a decoder, read from a Hugging Face config and checked at start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy_kernels import RotaryScaling
from buddy_routing.action_space import MILLI_LAYERS, ActionSpace

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class UnsupportedModelError(ValueError):
    """A checkpoint that we cannot serve exactly; the message names its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and numerics of one dense decoder. Sizes are counts; `windows` has one entry per layer (positions a token
    may look back, None for all). `exits` as in ActionSpace; `small_ffn_size` is the inner width of the small FFNs, 0
    without them."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RotaryScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    exits: tuple[int, ...] = ()
    small_ffn_size: int = 0

    @property
    def actions(self) -> ActionSpace:
        """The actions that a path may take at each column."""
        if self.exits:
            return ActionSpace.of_exits(self.num_layers, self.exits)
        if self.small_ffn_size:
            return ActionSpace.with_small_ffns(self.num_layers, self.small_cost)
        return ActionSpace.skip_or_run(self.num_layers)

    @property
    def small_cost(self) -> int:
        """The milli-layers of a layer with its small FFN: its share of the weights, rounded up."""
        attention = 2 * self.num_heads * self.head_dim + 2 * self.kv_dim
        small, big = (attention + 3 * size for size in (self.small_ffn_size, self.intermediate_size))
        return -(-MILLI_LAYERS * small // big)

    @property
    def num_columns(self) -> int:
        """Layers and exits: each has K/V of its own."""
        return self.num_layers + len(self.exits)

    @property
    def kv_dim(self) -> int:
        """Width of one token's K states, or V states, in a layer."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ModelSpec":
        """Read `config.json` of a Hugging Face directory (transformers normalises old and new spellings).

        Raises UnsupportedModelError for other architectures, rotary scalings and activations.
        """
        from transformers import AutoConfig

        return cls.from_config(AutoConfig.from_pretrained(directory))

    @classmethod
    def from_config(cls, config: Any) -> "ModelSpec":
        """Read a transformers config object. Raises UnsupportedModelError."""
        names = list(config.architectures or [])
        family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
        if family is None:
            raise UnsupportedModelError(f"architecture {names} is not supported; allowed: {', '.join(FAMILIES)}")
        if config.hidden_act != "silu":
            raise UnsupportedModelError(f"hidden_act {config.hidden_act!r} is not supported; allowed: 'silu'")
        if config.num_hidden_layers < 2:
            raise UnsupportedModelError(f"{config.num_hidden_layers} layer is too few to route; at least 2")
        rope = dict(config.rope_parameters)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            family=family,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rotary_scaling(rope, config.max_position_embeddings),
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(family, config),
        )


def _windows(family: str, config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if family == "llama" or window is None:
        return (None,) * config.num_hidden_layers
    if family == "mistral":
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _rotary_scaling(rope: dict[str, Any], max_context: int) -> RotaryScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"rotary scaling {kind!r} is not supported; allowed: 'default', 'linear', 'llama3', 'yarn'"
        )
    fields = {
        name: rope[name]
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        )
        if rope.get(name) is not None
    }
    original = rope.get("original_max_position_embeddings") or max_context
    return RotaryScaling(kind=kind, original_max_position=original, **fields)
