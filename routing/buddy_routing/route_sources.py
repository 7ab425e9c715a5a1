"""Which token's features decide which token's path: prompts in blocks, answers token by token (design section 2)."""

# B sequences, T tokens

import torch
from torch import Tensor


def route_sources(num_prompt: Tensor, num_tokens: int, route_block: int) -> Tensor:
    """[B, T] int64: the position whose features choose each token's path.

    A prompt token takes the last token of its block, `route_block` long and aligned to absolute positions, or of the
    prompt; an answer token takes itself. `num_prompt` is [B]. This is the rule that the engine's segments follow.
    """
    positions = torch.arange(num_tokens, device=num_prompt.device)
    block_end = (positions // route_block + 1) * route_block - 1
    in_prompt = torch.minimum(block_end, num_prompt[:, None] - 1)  # [B, T]
    return torch.where(positions < num_prompt[:, None], in_prompt, positions)
