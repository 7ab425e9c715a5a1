"""transformers' `generate` as a contender: bf16, default cache."""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from buddy_server.bench.contender import Timing, Tokens


class TransformersPeer:
    engine = "transformers"
    dtype = "bf16"

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        first, _ = self._generate(prompts, 1)
        whole, made = self._generate(prompts, new_tokens)
        first_tokens = tuple(made[:, len(prompts[0])].tolist())
        return Timing(first, whole - first, (new_tokens - 1) * len(prompts), first_tokens)

    def _generate(self, prompts: list[Tokens], new_tokens: int) -> tuple[float, torch.Tensor]:
        """Returns the seconds, and the prompts with their answers."""
        tokens = torch.tensor(prompts)
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        started = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        assert made.shape[1] == tokens.shape[1] + new_tokens
        return time.perf_counter() - started, made
