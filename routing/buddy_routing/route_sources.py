"""Which token's features choose which token's path: route blocks in prompts, single tokens in answers (section 2)."""

# B rows of tokens, each with one conversation or several end to end, T tokens

import torch
from torch import Tensor


def conversation_starts(begins: Tensor) -> Tensor:
    """[B, T] int64: where the conversation of each token starts. `begins` [B, T] marks first tokens; a row's first
    token always counts as one."""
    index = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, index, 0).cummax(1).values


def route_sources(starts: Tensor, in_answer: Tensor, route_block: int) -> Tensor:
    """[B, T] int64: the token whose features choose each token's path.

    For a prompt token, that is the last token of its route block, `route_block` long and counted from the start of the
    conversation, or of the prompt if the prompt ends earlier; for an answer token, the token itself. `starts` [B, T] is
    from `conversation_starts`, `in_answer` [B, T] bool. The engine's segments follow the same rule.
    """
    num_tokens = starts.shape[1]
    index = torch.arange(num_tokens, device=starts.device)
    block_end = starts + ((index - starts) // route_block + 1) * route_block - 1
    # A prompt ends before the next answer or conversation.
    boundary = torch.where(in_answer | (starts == index), index, num_tokens)
    next_boundary = boundary.flip(1).cummin(1).values.flip(1)[:, 1:]  # of token t: the first one after t
    next_boundary = torch.nn.functional.pad(next_boundary, (0, 1), value=num_tokens)
    return torch.where(in_answer, index, torch.minimum(block_end, next_boundary - 1))
