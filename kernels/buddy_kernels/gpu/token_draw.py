"""From logits to tokens, by the same draw as sampling.py: the same logits and number give the same token.

Nothing is sorted. Tokens have an order, by falling logit and of equals the lower index first, in which a token is one
64-bit integer. Those that may be kept are gathered once, with their weights; where a sum over the first of them reaches
a target is found by bisection. Weights and their sums are fp64, as the reference's.
"""

# N rows, V vocabulary

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.sampling import Sampling, draw

_BLOCK_TOKENS = 2048
_LAST_INDEX = tl.constexpr(2**31 - 1)
_LOWEST, _HIGHEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """`Sampling` of every row on the device, [N] each: fp64, but `top_k` int64. `uniform` is from [0, 1)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


def draw_tokens_reference(logits: Tensor, sampling: SamplingRows, rows: RowList, tokens: Tensor) -> None:
    """`draw_tokens` row by row; the truth."""
    for row in rows.listed().tolist():
        temperature, top_p, min_p = (float(x[row]) for x in (sampling.temperature, sampling.top_p, sampling.min_p))
        of_row = Sampling(temperature, int(sampling.top_k[row]), top_p, min_p)
        tokens[row] = draw(logits[row].float().cpu(), of_row, float(sampling.uniform[row]))


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _draw_tokens_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    rows,
    count,
    tokens,
    kept_keys,
    kept_weights,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    of_row = logits + row * VOCAB
    temperature, uniform = tl.load(temperatures + row), tl.load(uniforms + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    best = tl.full((), _LOWEST, tl.int64)
    for start in range(0, VOCAB, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logit = tl.load(of_row + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, tl.max(tl.where(index < VOCAB, _in_order(logit, index), _LOWEST), 0))
    token = _token(best)
    most = tl.load(of_row + token).to(tl.float64)
    # Of logits that are not finite there is nothing to draw: a difference of the highest from itself is 0 or NaN.
    if (temperature > 0) & (most - most == 0):
        if (top_k > 0) | (min_p > 0) | (top_p < 1):
            keys, weights = kept_keys + row * VOCAB, kept_weights + row * VOCAB
            least, left = min_p, min_p * 0
            if (top_k <= 0) & (top_p < 1):
                left = _weight_of_all(of_row, most, temperature, min_p, VOCAB, BLOCK)
                # Tokens that weigh less than this are together less than what top_p leaves out.
                least = tl.maximum(min_p, (1 - top_p) * left / VOCAB)
            num_kept = _gather(of_row, most, temperature, least, keys, weights, VOCAB, BLOCK)
            tl.debug_barrier()  # What follows reads what other threads have stored.
            floor = tl.full((), _LOWEST, tl.int64)
            if top_k > 0:
                most_kept = top_k.to(tl.float64)
                floor = _first_reaching(keys, weights, num_kept, floor, best, most_kept, True, False, BLOCK)
                left, _, _ = _summed(keys, weights, num_kept, floor, floor, False, BLOCK)
            if top_p < 1:
                floor = _first_reaching(keys, weights, num_kept, floor, best, top_p * left, False, False, BLOCK)
            kept, _, _ = _summed(keys, weights, num_kept, floor, floor, False, BLOCK)
            drawn = uniform * kept
            token = _token(_first_reaching(keys, weights, num_kept, floor, best, drawn, False, True, BLOCK))
        else:
            drawn_token = _drawn_of_all(of_row, most, temperature, uniform, VOCAB, BLOCK)
            token = tl.where(drawn_token < 0, token, drawn_token)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _in_order(logit, index):
    """An integer that is larger, the earlier a token comes: with a higher logit or, of equals, a lower index."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 is 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (index ^ _LAST_INDEX).to(tl.int64)


@triton.jit
def _token(in_order):
    return (in_order & _LAST_INDEX).to(tl.int32) ^ _LAST_INDEX


@triton.jit
def _weights(logits, index, most, temperature, VOCAB: tl.constexpr):
    """Logits of a block, and probabilities but for a factor: the likeliest token has 1."""
    logit = tl.load(logits + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
    return logit, tl.exp((logit.to(tl.float64) - most) / temperature)


@triton.jit
def _weight_of_all(logits, most, temperature, least, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens that weigh `least` or more."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        _, weight = _weights(logits, start + tl.arange(0, BLOCK), most, temperature, VOCAB)
        total += tl.sum(tl.where(weight >= least, weight, 0.0), 0)
    return total


@triton.jit
def _gather(logits, most, temperature, least, keys, weights, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Store the tokens that weigh `least` or more, and anything at all: their places in the order and their weights.
    Returns how many they are."""
    num_kept = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logit, weight = _weights(logits, index, most, temperature, VOCAB)
        is_kept = (weight >= least) & (weight > 0)
        into = num_kept + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(keys + into, _in_order(logit, index), mask=is_kept)
        tl.store(weights + into, weight, mask=is_kept)
        num_kept += tl.sum(is_kept.to(tl.int32), 0)
    return num_kept


@triton.jit
def _summed(keys, weights, num_kept, floor, threshold, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens down to `floor`: the sum of the weights, or the number, of those down to `threshold`; the last of
    these; the first after them."""
    total = tl.full((), 0.0, tl.float64)
    last = tl.full((), _HIGHEST, tl.int64)
    next_one = tl.full((), _LOWEST, tl.int64)
    for start in range(0, num_kept, BLOCK):
        place = start + tl.arange(0, BLOCK)
        key = tl.load(keys + place, mask=place < num_kept, other=_LOWEST)
        weight = tl.load(weights + place, mask=place < num_kept, other=0.0)
        is_kept = (place < num_kept) & (key >= floor)
        within = is_kept & (key >= threshold)
        total += tl.sum(tl.where(within, 1.0 if COUNTS else weight, 0.0).to(tl.float64), 0)
        last = tl.minimum(last, tl.min(tl.where(within, key, _HIGHEST), 0))
        next_one = tl.maximum(next_one, tl.max(tl.where(is_kept & (key < threshold), key, _LOWEST), 0))
    return total, last, next_one


@triton.jit
def _first_reaching(
    keys,
    weights,
    num_kept,
    floor,
    best,
    target,
    COUNTS: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first token with which the sum of those up to it reaches `target`, or PASSES it; else the last to `floor`."""
    _, reached, _ = _summed(keys, weights, num_kept, floor, floor, COUNTS, BLOCK)
    # Between a token that is far enough and one past the last that is not.
    too_early = best + 1
    while reached + 1 < too_early:
        middle = (reached >> 1) + (too_early >> 1) + (reached & too_early & 1)
        total, last, next_one = _summed(keys, weights, num_kept, floor, middle, COUNTS, BLOCK)
        is_reached = total > target if PASSES else total >= target
        reached = tl.where(is_reached, last, reached)
        too_early = tl.where(is_reached, too_early, next_one + 1)
    return reached


@triton.jit
def _drawn_of_all(logits, most, temperature, uniform, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Nothing is cut off: tokens in the order of their indices."""
    target = uniform * _weight_of_all(logits, most, temperature, 0.0, VOCAB, BLOCK)
    passed = tl.full((), 0.0, tl.float64)
    before = tl.full((), 0.0, tl.float64)
    found = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        _, weight = _weights(logits, start + tl.arange(0, BLOCK), most, temperature, VOCAB)
        of_block = tl.sum(weight, 0)
        # The last block that is not passed before the target; one that weighs nothing has no token to give.
        is_before = (passed <= target) & (of_block > 0)
        found = tl.where(is_before, start, found)
        before = tl.where(is_before, passed, before)
        passed += of_block
    index = found + tl.arange(0, BLOCK)
    _, weight = _weights(logits, index, most, temperature, VOCAB)
    beyond = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
    # Rounding may leave the target a hair past the block's sum.
    last = tl.max(tl.where(weight > 0, index, -1), 0)
    return tl.minimum(tl.min(tl.where(beyond, index, _LAST_INDEX), 0), last)


def draw_tokens(logits: Tensor, sampling: SamplingRows, rows: RowList, tokens: Tensor) -> None:
    """The next token of each listed row. Takes 16 bytes of memory for each logit.

    The reference adds up probabilities from the likeliest on, this kernel in blocks. So they round differently, and
    where a sum meets top_p exactly, one may keep a token more than the other.

    Args:
        logits: [N, V] contiguous, fp32, bf16 or fp16; at least one of each row is finite.
        sampling: as `Sampling`, contiguous: temperature 0 takes the likeliest token, the lowest of equals.
        rows: of N.
        tokens: [N] int64 contiguous; rows that are not listed stay.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, vocab = logits.shape
    device = logits.device
    check_dense("logits", logits, device, (num_rows, vocab), *FLOATS)
    check_dense("sampling.top_k", sampling.top_k, device, (num_rows,), torch.int64)
    for name in ("temperature", "top_p", "min_p", "uniform"):
        check_dense(f"sampling.{name}", getattr(sampling, name), device, (num_rows,), torch.float64)
    rows.check("rows", num_rows, device)
    check_dense("tokens", tokens, device, (num_rows,), torch.int64)
    launch(
        _draw_tokens_kernel,
        (num_rows,),
        logits,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.uniform,
        rows.indices,
        rows.count,
        tokens,
        torch.empty(num_rows, vocab, dtype=torch.int64, device=device),
        torch.empty(num_rows, vocab, dtype=torch.float64, device=device),
        VOCAB=vocab,
        BLOCK=min(_BLOCK_TOKENS, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
