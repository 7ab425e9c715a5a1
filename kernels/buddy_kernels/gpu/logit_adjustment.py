"""What is done to logits before a token is drawn: penalties, bias, tokens that are not allowed."""

# N rows, V vocabulary

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from buddy_kernels.checks import check_dense
from buddy_kernels.gpu.launch import FLOATS, launch
from buddy_kernels.gpu.row_lists import RowList
from buddy_kernels.sampling import Sampling, adjusted

_BLOCK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """By lane, since they stay with a sequence: `presence` and `frequency` [lanes] fp64, `counts` [lanes, V] int32 of
    the tokens that the answer has, `bias` [lanes, V] fp32. By row: `allowed` [N, V / 8 rounded up] uint8, a bit for
    each token, the lowest of the first byte first; None allows all."""

    presence: Tensor
    frequency: Tensor
    counts: Tensor
    bias: Tensor
    allowed: Tensor | None = None


def adjust_logits_reference(
    logits: Tensor, lanes: Tensor, adjustments: LogitAdjustments, rows: RowList, out: Tensor
) -> None:
    """`adjust_logits` row by row; the truth."""
    for row in rows.listed().tolist():
        lane = int(lanes[row])
        counts = {int(token): int(adjustments.counts[lane, token]) for token in adjustments.counts[lane].nonzero()}
        bias = {int(token): float(adjustments.bias[lane, token]) for token in adjustments.bias[lane].nonzero()}
        presence, frequency = float(adjustments.presence[lane]), float(adjustments.frequency[lane])
        sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency, bias=bias)
        allowed = None if adjustments.allowed is None else bytearray(adjustments.allowed[row].tolist())
        out[row] = adjusted(logits[row].float().cpu(), sampling, counts, allowed)


@triton.jit(do_not_specialize_on_alignment=["rows", "count"])
def _adjust_logits_kernel(
    logits,
    lanes,
    presence,
    frequency,
    counts,
    bias,
    allowed,
    rows,
    count,
    out,
    VOCAB: tl.constexpr,
    ALLOWED_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(count):
        return
    row = tl.load(rows + place).to(tl.int64)
    lane = tl.load(lanes + row)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < VOCAB
    logit = tl.load(logits + row * VOCAB + token, mask=is_token, other=0.0).to(tl.float32)
    times = tl.load(counts + lane * VOCAB + token, mask=is_token, other=0)
    penalty = (tl.load(presence + lane) + tl.load(frequency + lane) * times.to(tl.float64)).to(tl.float32)
    logit -= tl.where(times > 0, penalty, 0.0)
    logit += tl.load(bias + lane * VOCAB + token, mask=is_token, other=0.0)
    if allowed is not None:
        bits = tl.load(allowed + row * ALLOWED_BYTES + token // 8, mask=is_token, other=0).to(tl.int32)
        logit = tl.where((bits >> (token % 8)) & 1 != 0, logit, float("-inf"))
    tl.store(out + row * VOCAB + token, logit, mask=is_token)


def adjust_logits(logits: Tensor, lanes: Tensor, adjustments: LogitAdjustments, rows: RowList, out: Tensor) -> None:
    """The logits of the listed rows as `draw_tokens` takes them.

    Args:
        logits: [N, V] contiguous, fp32, bf16 or fp16.
        lanes: [N] int64.
        adjustments: penalties, counts and bias of every lane, and the rows' allowed tokens.
        rows: of N.
        out: [N, V] fp32 contiguous; rows that are not listed stay.

    Raises:
        ValueError: a tensor does not fit.
    """
    num_rows, vocab = logits.shape
    allowed_bytes = triton.cdiv(vocab, 8)
    device, num_lanes = logits.device, adjustments.counts.shape[0]
    check_dense("logits", logits, device, (num_rows, vocab), *FLOATS)
    check_dense("lanes", lanes, device, (num_rows,), torch.int64)
    check_dense("adjustments.presence", adjustments.presence, device, (num_lanes,), torch.float64)
    check_dense("adjustments.frequency", adjustments.frequency, device, (num_lanes,), torch.float64)
    check_dense("adjustments.counts", adjustments.counts, device, (num_lanes, vocab), torch.int32)
    check_dense("adjustments.bias", adjustments.bias, device, (num_lanes, vocab), torch.float32)
    if adjustments.allowed is not None:
        check_dense("adjustments.allowed", adjustments.allowed, device, (num_rows, allowed_bytes), torch.uint8)
    rows.check("rows", num_rows, device)
    check_dense("out", out, device, (num_rows, vocab), torch.float32)
    launch(
        _adjust_logits_kernel,
        (num_rows, triton.cdiv(vocab, _BLOCK_TOKENS)),
        logits,
        lanes,
        adjustments.presence,
        adjustments.frequency,
        adjustments.counts,
        adjustments.bias,
        adjustments.allowed,
        rows.indices,
        rows.count,
        out,
        VOCAB=vocab,
        ALLOWED_BYTES=allowed_bytes,
        BLOCK=_BLOCK_TOKENS,
    )
