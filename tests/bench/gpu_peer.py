"""The peer of gpu.py: transformers' generate with a static cache, which it compiles on a GPU by itself."""

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, StoppingCriteria, StoppingCriteriaList

from buddy_kernels.gpu.offline import ModelShape
from gpu_models import NORM_EPS, ROPE_THETA

WARM_UP = 16
"""Tokens made before those that count: compiling, and recording a graph."""


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token is made, and stops nothing."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []
        self.times_s: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> list[float]:
        """Between a token and the next."""
        if self.events:
            self.events[-1].synchronize()
        by_device = [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.events)]
        return by_device or [after - before for before, after in pairwise(self.times_s)]


@torch.no_grad()
def peer_step_s(shape: ModelShape, batch: int, prompt: int, steps: int, device: torch.device) -> float:
    """The median time of a decode step with random weights: greedy, `batch` rows of `prompt` tokens."""
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.dim,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": prompt + WARM_UP + steps + 2,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = Qwen2Config(**sizes) if shape.has_qkv_bias else LlamaConfig(**sizes, head_dim=shape.head_dim)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tokens = torch.randint(0, shape.vocab, (batch, prompt))
    clock = Clock()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=WARM_UP + steps + 1,
        do_sample=False,
        cache_implementation="static",
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    if device.type == "cuda":
        torch.compiler.reset()
    return median(clock.seconds()[WARM_UP:])
