"""Checkpoints load whatever their cut and dtype, and say what is wrong when they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from buddy_routing.checkpoint import CheckpointError, LoadedModel, load_model, resolve_model, save_model
from buddy_routing.model_spec import UnsupportedModelError
from tiny_models import SHAPE, save_random_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(directory, dtype, CPU)


def assert_same_model(one: LoadedModel, other: LoadedModel) -> None:
    assert one.fingerprint == other.fingerprint
    theirs = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, theirs.pop(name)), name
    assert not theirs


def change_weights(directory: Path, **changes: Any) -> None:
    """Replace tensors, "__" for a dot; None takes one out."""
    path = directory / "model.safetensors"
    weights = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3"])
def test_sharded_and_single_file_are_the_same_model(name: str, tmp_path: Path) -> None:
    save_random_model(name, tmp_path / "single")
    save_random_model(name, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_model(load(tmp_path / "single"), load(tmp_path / "sharded"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_from_any_stored_dtype(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    theirs = save_random_model("llama", tmp_path)
    theirs.to(stored).save_pretrained(tmp_path)
    ours = load(tmp_path, wanted).model
    assert {parameter.dtype for parameter in ours.parameters()} == {wanted}
    assert ours.inv_freq.dtype == torch.float32
    weights = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"].to(wanted))


def test_tied_embeddings_share_their_memory_and_untied_do_not(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path / "tied")
    save_random_model("llama-biased", tmp_path / "untied")
    tied, untied = load(tmp_path / "tied").model, load(tmp_path / "untied").model
    assert tied.lm_head.weight.data_ptr() == tied.embed_tokens.weight.data_ptr()
    assert untied.lm_head.weight.data_ptr() != untied.embed_tokens.weight.data_ptr()
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_output_weights_stored_beside_tied_embeddings_change_nothing(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    before = load(tmp_path)
    change_weights(tmp_path, lm_head__weight=torch.zeros(SHAPE["vocab_size"], SHAPE["hidden_size"]))
    assert_same_model(before, load(tmp_path))


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    before = load(tmp_path)
    change_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert_same_model(before, load(tmp_path))


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "qwen3", "mistral"])
def test_saved_model_is_one_that_transformers_loads(name: str, tmp_path: Path) -> None:
    save_random_model(name, tmp_path / "first")
    loaded = load(tmp_path / "first")
    save_model(loaded.model, AutoConfig.from_pretrained(tmp_path / "first"), tmp_path / "second", torch.float32)
    assert_same_model(loaded, load(tmp_path / "second"))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    with torch.inference_mode():
        assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    change_weights(tmp_path, model__layers__3__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors, layers\.3\.mlp\.up_proj\.weight among them"):
        load(tmp_path)


def test_tensor_too_many_is_named(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    change_weights(tmp_path, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias, which a llama model does not have"):
        load(tmp_path)


def test_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    change_weights(tmp_path, model__norm__weight=torch.zeros(31))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\], config\.json asks for \[32\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"\['MixtralForCausalLM'\] is not supported; allowed: Llama"),
        ({"architectures": None}, r"architecture \[\] is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported; allowed: 'silu'"),
        ({"num_hidden_layers": 1}, r"1 layer is too few to route"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            r"rotary scaling 'dynamic' is not supported; allowed: 'default', 'linear', 'llama3', 'yarn'",
        ),
    ],
)
def test_model_we_cannot_serve_exactly_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_random_model("llama", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; other weight formats are not loaded"):
        load(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {shard.name}"):
        load(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_shard_without_the_tensor_its_index_promises_is_named(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        name for name in names if name != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*model\.norm\.weight"):
        load(tmp_path)


def test_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/model", "a/b/c"])
def test_name_that_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"model '{name}' is neither a directory nor a hub id"):
        resolve_model(name)


def test_fingerprint_is_the_same_for_any_dtype_it_is_loaded_in(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    assert load(tmp_path).fingerprint == load(tmp_path, torch.bfloat16).fingerprint


def test_fingerprint_changes_with_any_tensor(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    seen = {load(tmp_path).fingerprint}
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1e-3}, tmp_path / "model.safetensors")
        seen.add(load(tmp_path).fingerprint)
    assert len(seen) == 1 + len(weights)


def test_fingerprint_changes_with_the_config(tmp_path: Path) -> None:
    save_random_model("llama", tmp_path)
    before = load(tmp_path).fingerprint
    change_config(tmp_path, rms_norm_eps=1e-4)
    assert load(tmp_path).fingerprint != before
