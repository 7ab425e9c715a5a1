"""Block sizes by compute capability. Chosen by hand from bytes in flight and shared memory; no card has confirmed them.

None of those that a sum is split by follows the batch: a row's bits are the same in all.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from buddy_kernels.gpu.launch import Capability, capability_of

PRODUCT_PARTS = 4
"""A program of a product reads so many parts of each output's inputs at once, one for each of its warps."""
_MIN_ROWS, _FEW_ROWS = 8, 16
_MAX_BUFFERS = 5
_CONTEXT, _SPLITS, _MIN_BLOCKS = 64, 32, 2


@dataclass(frozen=True, slots=True)
class ProductBlocks:
    """What a program of a product computes at once: so many rows by so many outputs of each of its matrices, from so
    many inputs in a part."""

    rows: int
    outputs: int
    inputs: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionBlocks:
    """A context is read in blocks of `context` tokens by `dims` numbers, in up to `splits` splits of `min_blocks` or
    more, which `programs` share."""

    context: int
    dims: int
    splits: int
    min_blocks: int
    programs: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Card:
    """Its processors, and the shared memory of one, which a program may have for itself."""

    processors: int
    shared_bytes: int


OTHER = Card(100, 99 << 10)
CARDS: dict[Capability, Card] = {
    (8, 0): Card(108, 163 << 10),
    (9, 0): Card(132, 227 << 10),
    (10, 0): Card(148, 227 << 10),
}


def card_of(device: torch.device) -> Card:
    capability = capability_of(device)
    return OTHER if capability is None else CARDS.get(capability, OTHER)


def product_blocks(x: Tensor, num_outputs: int, num_matrices: int) -> ProductBlocks:
    """For rows `x` [N, I], which decide on the number of rows and the card. Of few rows, 16 outputs, so that there are
    many programs; 32 where there are enough all the same. Of many rows 32, since every program reads all their inputs
    again, but no more sums than registers hold."""
    card = card_of(x.device)
    rows = max(_MIN_ROWS, triton.next_power_of_2(x.shape[0]))
    registers, inputs = (2, 16) if x.dtype == torch.float32 else (1, 64)
    num_wide = triton.cdiv(num_outputs, 32)
    if rows <= _FEW_ROWS:
        is_wide = num_matrices == 1 and num_wide >= 2 * card.processors
    else:
        is_wide = rows * num_matrices * registers <= 64 and 2 * num_wide >= card.processors
    outputs = 32 if is_wide else 16
    # Two programs share a processor, where there are so many: one computes while the other begins or ends.
    room = card.shared_bytes // (2 if num_outputs > outputs * card.processors else 1)
    buffer_bytes = (rows + outputs * num_matrices) * PRODUCT_PARTS * inputs * x.element_size()
    num_buffers = max(2, min(_MAX_BUFFERS, room // buffer_bytes))
    return ProductBlocks(rows, outputs, inputs, num_buffers + 1)


def attention_blocks(q: Tensor, num_kv_heads: int) -> AttentionBlocks:
    """For queries [N, Hq, Dh], up to eight programs for each of the card's processors, a power of two for each row."""
    card = card_of(q.device)
    dims = max(16, triton.next_power_of_2(q.shape[2]))
    programs = min(_SPLITS, 8 * card.processors // (q.shape[0] * num_kv_heads))
    buffer_bytes = 2 * _CONTEXT * dims * q.element_size()
    # Keys are found by the block table, which is itself read ahead: one buffer takes three stages, two take five.
    num_stages = 5 if 2 * buffer_bytes <= card.shared_bytes // 2 else 3
    return AttentionBlocks(_CONTEXT, dims, _SPLITS, _MIN_BLOCKS, triton.next_power_of_2(programs // 2 + 1), num_stages)
