"""A real trained model of 260 thousand parameters, turned from llama2.c's format into a Hugging Face directory.

The formats are those of llama2.c's `legacy_export` and of its tokenizer export (github.com/karpathy/llama2.c).
"""

# H heads, E head dim, D model dim

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

SOURCE = Path(__file__).parent / "data" / "stories260K"
BOS, EOS = 1, 2


def convert(directory: Path) -> Path:
    """Write config, weights and tokenizer; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    blob = (SOURCE / "stories260K.bin").read_bytes()
    dim, hidden, num_layers, num_heads, num_kv_heads, vocab, context = struct.unpack_from("7i", blob)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        # A negative size says that the output weights are the file's own.
        "vocab_size": abs(vocab),
        "tie_word_embeddings": vocab > 0,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        # Stories follow one another; the next one's beginning ends this one.
        "eos_token_id": [BOS, EOS],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(read_weights(blob, config), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(read_pieces((SOURCE / "tok512.bin").read_bytes()), directory)
    return directory


def read_weights(blob: bytes, config: dict) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names."""
    values = torch.from_numpy(np.frombuffer(blob, dtype=np.float32, offset=28).copy())
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + int(np.prod(shape))
        return values[start:at].view(shape)

    dim, hidden, num_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = dim // num_heads
    kv_dim = num_kv_heads * head_dim
    weights = {"model.embed_tokens.weight": take(config["vocab_size"], dim)}
    stacked = {
        "input_layernorm": take(num_layers, dim),
        "self_attn.q_proj": take(num_layers, dim, dim),
        "self_attn.k_proj": take(num_layers, kv_dim, dim),
        "self_attn.v_proj": take(num_layers, kv_dim, dim),
        "self_attn.o_proj": take(num_layers, dim, dim),
        "post_attention_layernorm": take(num_layers, dim),
        "mlp.gate_proj": take(num_layers, hidden, dim),
        "mlp.down_proj": take(num_layers, dim, hidden),
        "mlp.up_proj": take(num_layers, hidden, dim),
    }
    weights["model.norm.weight"] = take(dim)
    take(2, config["max_position_embeddings"], head_dim // 2)  # cosines and sines, computed anew by everyone
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = take(config["vocab_size"], dim)
    assert at == len(values), f"read {at} of {len(values)} weights: not the format we think"
    for name, layers in stacked.items():
        for index, layer in enumerate(layers):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                layer = halves_from_pairs(layer, head_dim)
            weights[f"model.layers.{index}.{name}.weight"] = layer.clone()
    return weights


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of [H * E, D] reordered: llama2.c rotates neighbours, Hugging Face the halves of a head."""
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H, E / 2, 2, D]
    return heads.transpose(1, 2).reshape(weight.shape)


def read_pieces(blob: bytes) -> list[str]:
    """The vocabulary in order of token id, its merged pieces in order of merging."""
    pieces, at = [], 4
    while at < len(blob):
        _, length = struct.unpack_from("fi", blob, at)
        at += 8
        pieces.append(blob[at : at + length].decode().replace(" ", "▁"))
        at += length
    # llama2.c prints these two on lines of their own.
    pieces[BOS], pieces[EOS] = "<s>", "</s>"
    return pieces


def write_tokenizer(pieces: list[str], directory: Path) -> None:
    """Llama 2's kind: SentencePiece BPE with bytes for what has no piece."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3 + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
