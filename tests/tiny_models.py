"""Tiny random checkpoints of every supported family, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama-3-scaling": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-linear-scaling": LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama-yarn-scaling": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": MistralConfig(**SHAPE, head_dim=8),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=20),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=3),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def save_random_model(name: str, directory: Path, **save_options: Any) -> Any:
    """Write a random fp32 checkpoint and return transformers' model of it, in eval mode.

    Weights are larger than the usual 0.02, so that layers, biases and norms matter to the output.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    model.save_pretrained(directory, **save_options)
    return model
