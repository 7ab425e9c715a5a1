"""llama.cpp through llama-cpp-python as a contender, on the same weights, which this bench writes as GGUF."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buddy_routing.checkpoint import load_model
from buddy_routing.decoder import DecoderLayer, RoutedDecoder
from buddy_server.bench.contender import PeerError, Timing, Tokens

MAX_BATCH = 2048
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}


class LlamaCppPeer:
    """`dtype` is "bf16", or "int8" for q8_0. Raises PeerError."""

    engine = "llama.cpp"

    def __init__(self, directory: Path, dtype: str, work: Path, max_sequences: int, max_tokens: int) -> None:
        self.dtype = dtype
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            raise PeerError("peer llama.cpp needs: pip install llama-cpp-python gguf") from error
        self._api: Any = llama_cpp
        model = load_model(directory, torch.float32, torch.device("cpu")).model
        self._vocab_size = model.spec.vocab_size
        path = work / f"{dtype}.gguf"
        write_gguf(model, dtype, path)
        # C keeps the pointer, so the callback must live as long.
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise PeerError("llama.cpp cannot load the weights written for it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_sequences * max_tokens
        params.n_seq_max = max_sequences
        params.n_batch = params.n_ubatch = MAX_BATCH
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        # One shared KV buffer, so that a single sequence may be long.
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)

    def answer(self, prompts: list[Tokens], new_tokens: int) -> Timing:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        started = time.perf_counter()
        newest = [0] * len(prompts)
        for index, prompt in enumerate(prompts):
            self._decode([(token, place, index, place == len(prompt) - 1) for place, token in enumerate(prompt)])
            newest[index] = self._likeliest(len(prompt) - 1)
        prefilled, first_tokens = time.perf_counter(), tuple(newest)
        length = len(prompts[0])
        for step in range(new_tokens - 1):
            self._decode([(token, length + step, index, True) for index, token in enumerate(newest)])
            newest = [self._likeliest(index) for index in range(len(prompts))]
        return Timing(
            prefilled - started, time.perf_counter() - prefilled, (new_tokens - 1) * len(prompts), first_tokens
        )

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Decode rows of (token, position, sequence, whether its logits are needed), MAX_BATCH at a time."""
        for start in range(0, len(rows), MAX_BATCH):
            part = rows[start : start + MAX_BATCH]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
            if self._api.llama_decode(self._context, batch):
                raise PeerError("llama.cpp could not decode a batch")

    def _likeliest(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row % MAX_BATCH)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def write_gguf(model: RoutedDecoder, dtype: str, path: Path) -> None:
    """Write the weights under llama.cpp's names, matrices in bf16 or q8_0. Raises PeerError for other families."""
    import gguf

    spec = model.spec
    biased = spec.output_bias or spec.mlp_bias or (spec.family == "llama" and spec.qkv_bias)
    if spec.family not in ARCHITECTURES or spec.rope_scaling or spec.qk_norm or biased or any(spec.windows):
        raise PeerError(
            f"peer llama.cpp: this {spec.family} variant is not supported; allowed: llama without biases, qwen2, "
            "both without scaled rotation and without windows"
        )
    kind = gguf.GGMLQuantizationType.Q8_0 if dtype == "int8" else gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[spec.family])
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)

    def add(name: str, tensor: torch.Tensor) -> None:
        array = tensor.detach().float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", model.embed_tokens.weight)
    add("output_norm.weight", model.norm.weight)
    if not spec.tie_embeddings:
        add("output.weight", model.lm_head.weight)
    for index, layer in enumerate(model.blocks):
        for name, tensor in _layer_tensors(layer, spec.family == "llama").items():
            add(f"blk.{index}.{name}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer_tensors(layer: DecoderLayer, paired: bool) -> dict[str, torch.Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    tensors = {
        "attn_norm.weight": layer.input_layernorm.weight,
        "ffn_norm.weight": layer.post_attention_layernorm.weight,
        "attn_output.weight": attention.o_proj.weight,
        "ffn_gate.weight": mlp.gate_proj.weight,
        "ffn_up.weight": mlp.up_proj.weight,
        "ffn_down.weight": mlp.down_proj.weight,
        "attn_v.weight": attention.v_proj.weight,
    }
    for name, projection in (("q", attention.q_proj), ("k", attention.k_proj)):
        weight = projection.weight
        # In this family llama.cpp rotates adjacent pairs, where we rotate halves.
        tensors[f"attn_{name}.weight"] = _neighbours(weight, attention.head_dim) if paired else weight
    for name, projection in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
        if projection.bias is not None:
            tensors[f"attn_{name}.bias"] = projection.bias
    return tensors


def _neighbours(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)
