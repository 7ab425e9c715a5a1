"""Router artifacts come back as they were saved, or say what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buddy_routing.artifact import load_router, save_router
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.router_config import ArtifactError, RouterConfig, read_router_config

CPU = torch.device("cpu")
NUM_LAYERS, KV_DIM, RANK = 6, 16, 8
CONFIG = RouterConfig("abc", NUM_LAYERS, KV_DIM, RANK, "cosine", 0.3, route_block=32, reroute_every=2)


def saved(directory: Path) -> LearnedRouter:
    torch.manual_seed(0)
    router = LearnedRouter(DecisionModule(2 * KV_DIM, NUM_LAYERS - 2, RANK), torch.rand(NUM_LAYERS - 2), 0.3, "mine", 2)
    save_router(directory, router, CONFIG)
    return router


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "router_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_saved_router_comes_back_the_same(tmp_path: Path) -> None:
    router = saved(tmp_path / "new" / "folder")
    loaded, config = load_router(tmp_path / "new" / "folder", "abc", CPU)
    assert config == CONFIG
    assert (loaded.prior_weight, loaded.reroute_every) == (0.3, 2)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    features = torch.randn(20, 2 * KV_DIM)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.scores(features), router.scores(features))
    torch.testing.assert_close(loaded.scores(features), router.scores(features))


def test_router_id_follows_the_weights(tmp_path: Path) -> None:
    router = saved(tmp_path)
    first = load_router(tmp_path, "abc", CPU)[0].router_id
    assert first == load_router(tmp_path, "abc", CPU)[0].router_id
    with torch.no_grad():
        router.decision.up.bias[0] += 1
    save_router(tmp_path, router, CONFIG)
    second = load_router(tmp_path, "abc", CPU)[0].router_id
    assert second != first
    assert second.startswith("learned:")


def test_router_of_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ArtifactError, match="made for a model with fingerprint abc, this model has xyz"):
        load_router(tmp_path, "xyz", CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version 2 is not supported; allowed: \(1,\)"),
        ({"kv_policy": "drop"}, r"kv_policy 'drop' is not supported; allowed: \('project',\)"),
        ({"features": "entropy"}, r"features 'entropy' is not supported; allowed: .*'mean_v'"),
        ({"num_layers": None}, r"cannot be read: .*num_layers"),
        ({"surprise": 1}, r"cannot be read: .*surprise"),
    ],
)
def test_config_of_an_unknown_kind_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_router(tmp_path, "abc", CPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / "router_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"router_config.json cannot be read"):
        read_router_config(tmp_path)


@pytest.mark.parametrize("name", ["router_config.json", "router.safetensors"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"is not a router artifact: it has no {name}"):
        load_router(tmp_path, "abc", CPU)


def test_directory_that_is_not_there_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a router artifact"):
        load_router(tmp_path / "nowhere", "abc", CPU)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, rank=RANK + 1)
    with pytest.raises(ArtifactError, match=r"router.safetensors does not fit"):
        load_router(tmp_path, "abc", CPU)
    saved(tmp_path)
    weights = load_file(tmp_path / "router.safetensors")
    weights.pop("prior")
    save_file(weights, tmp_path / "router.safetensors")
    with pytest.raises(ArtifactError, match=r"router.safetensors does not fit"):
        load_router(tmp_path, "abc", CPU)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"router.safetensors does not fit"):
        load_router(tmp_path, "abc", CPU)
