"""Block sizes by compute capability. Chosen by hand from bytes in flight and shared memory; no card has confirmed them.

None of them follows the batch: what a row's sums are split into, and with it the row's bits, is the same in all.
"""

from dataclasses import dataclass

import torch

from buddy_kernels.gpu.launch import Capability, capability_of


@dataclass(frozen=True, slots=True)
class ProductBlocks:
    """A program's part of the weights: so many outputs, and at once so many bytes of each one's inputs. Half as many
    outputs, where there would be fewer programs than the card has `processors`.

    `outputs` stays under 64: from there on Triton takes instructions whose shape follows the batch (wgmma, tcgen05).
    """

    processors: int
    outputs: int
    input_bytes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionBlocks:
    """A context is read in blocks of `context` tokens, by up to `splits` programs of `min_blocks` blocks or more."""

    context: int
    splits: int
    min_blocks: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Blocks:
    product: ProductBlocks
    attention: AttentionBlocks


DEFAULT = Blocks(ProductBlocks(100, 32, 256, 4, 3), AttentionBlocks(64, 16, 4, 4, 2))
BY_CAPABILITY: dict[Capability, Blocks] = {
    (8, 0): Blocks(ProductBlocks(108, 32, 256, 4, 4), AttentionBlocks(64, 32, 4, 4, 3)),
    (9, 0): Blocks(ProductBlocks(132, 32, 256, 4, 5), AttentionBlocks(64, 32, 4, 4, 3)),
    (10, 0): Blocks(ProductBlocks(148, 32, 256, 4, 6), AttentionBlocks(64, 32, 4, 4, 3)),
}


def blocks_for(device: torch.device) -> Blocks:
    capability = capability_of(device)
    return DEFAULT if capability is None else BY_CAPABILITY.get(capability, DEFAULT)
