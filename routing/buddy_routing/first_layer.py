"""The part of a model that routing uses: the first layer's V, which needs no attention (design section 2)."""

# Hkv key/value heads, Dh head dim

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from buddy_routing.decoder import DecoderLayer, RoutedDecoder


@dataclass(frozen=True, slots=True)
class FirstLayer:
    """Embeddings and first layer of a decoder, sharing its weights; the rest of the decoder may be freed."""

    embed_tokens: nn.Embedding
    layer: DecoderLayer

    @classmethod
    def of(cls, model: RoutedDecoder) -> "FirstLayer":
        return cls(model.embed_tokens, model.blocks[0])

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def v(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> V states [..., Hkv, Dh]."""
        return self.layer.value(self.embed_tokens(tokens))
