"""From logits to a token. The reference; the fast path is native/sampling.h, inside the step."""

# V vocabulary

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's token is drawn. `temperature` 0 takes the likeliest, the lowest of equals; `top_k` 0, `top_p` 1 and
    `min_p` 0 cut nothing off. Before that, every token that the answer has already loses `presence_penalty`, and
    `frequency_penalty` for each time it has it, and tokens of `bias` gain that (OpenAI's formulas)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token; its log probability and the `likeliest` tokens with theirs, best first, where they were asked for."""

    token_id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, sampling: Sampling, uniform: float) -> int:
    """One token from adjusted logits [V] fp32 on the CPU; `uniform` is from [0, 1)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # fp64 so that the running sum, and with it the drawn token, does not hang on rounding. The largest logit becomes 0
    # first: divided by a temperature next to nothing, it would overflow.
    below = logits.double() - logits.max()
    probs = (below / sampling.temperature).softmax(-1)
    if sampling.top_k or sampling.min_p or sampling.top_p < 1:
        # Stable, as topk is not: of equal ones the lower index is kept.
        probs, tokens = torch.sort(probs, descending=True, stable=True)
        probs = _filtered(probs[: sampling.top_k or None], sampling.min_p, sampling.top_p)
    else:
        # Nothing to cut off, nothing to sort: a large vocabulary takes milliseconds.
        tokens = torch.arange(len(probs))
    cumulative = probs.cumsum(0)
    # Clamped: rounding may leave the drawn number a hair past the last kept token's share.
    index = min(int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)), int(probs.nonzero()[-1]))
    return int(tokens[index])


def adjusted(logits: Tensor, sampling: Sampling, counts: Mapping[int, int], allowed: bytearray | None) -> Tensor:
    """Logits [V] fp32 as `draw` takes them, a copy: penalties on the tokens of `counts`, the bias, and no token whose
    bit in `allowed` is 0."""
    logits = logits.clone()
    if sampling.has_penalties:
        for token, count in counts.items():
            logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, bias in sampling.bias.items():
        logits[token] += bias
    if allowed is not None:
        logits.masked_fill_(~allowed_tokens(allowed, len(logits)), -torch.inf)
    return logits


def allowed_tokens(allowed: bytearray, vocab_size: int) -> Tensor:
    """[V] bool of a bit mask, the lowest bit of the first byte first."""
    packed = torch.frombuffer(allowed, dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:vocab_size].bool()


def with_logprobs(logits: Tensor, token: int, num_likeliest: int) -> SampledToken:
    """The token with its log probability under unadjusted logits [V], and the `num_likeliest` likeliest with theirs; of
    equals the lower index first."""
    logprobs = logits.double().log_softmax(-1)
    values, tokens = torch.sort(logprobs, descending=True, stable=True)
    likeliest = zip(tokens[:num_likeliest].tolist(), values[:num_likeliest].tolist(), strict=True)
    return SampledToken(token, float(logprobs[token]), tuple(likeliest))


def _filtered(probs: Tensor, min_p: float, top_p: float) -> Tensor:
    """Probabilities in falling order, those beyond `min_p` and `top_p` set to 0; the first always stays."""
    keep = probs >= min_p * probs[0]
    if top_p < 1:
        # A share of what top_k and min_p have left, as vLLM takes it.
        left = torch.where(keep, probs, 0.0)
        keep &= left.cumsum(0) - left < top_p * left.sum()
    keep[0] = True
    return torch.where(keep, probs, 0.0)
