"""Models with random weights, to estimate the speed of a user's model of the same shape."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

UNKNOWN = "w0 "
COMMON = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 8192}
SHAPES: dict[str, PretrainedConfig] = {
    "16x256": LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        **COMMON,
    ),
    "12x768": LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        **COMMON,
    ),
    # The shape of Qwen2-0.5B.
    "24x896": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        **COMMON,
    ),
}


def save_random_model(shape: str, directory: Path) -> None:
    """Write a bf16 checkpoint without end tokens, with a tokenizer that has a word for every token."""
    torch.manual_seed(0)
    config = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    words = {f"w{index} ": index for index in range(config.vocab_size)}
    Tokenizer(models.WordLevel(words, UNKNOWN)).save(str(directory / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
