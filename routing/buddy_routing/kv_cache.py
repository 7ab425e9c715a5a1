"""Memory for the keys and values of every layer and exit, in blocks that sequences borrow."""

# C columns of a path, P blocks in the pool, K slots a block, Hkv key/value heads, Dh head dim

from dataclasses import dataclass

import torch
from torch import Tensor

from buddy_routing.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KVCache:
    """The paged pool. One block table per sequence serves all layers: KV block p of column c is `k[c, p]`."""

    k: Tensor  # [C, P, K, Hkv, Dh]
    v: Tensor  # [C, P, K, Hkv, Dh]

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        shape = (spec.num_columns, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        return cls(k=torch.zeros(shape, dtype=dtype, device=device), v=torch.zeros(shape, dtype=dtype, device=device))

    @property
    def block_size(self) -> int:
        return self.k.shape[2]
