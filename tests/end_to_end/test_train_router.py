"""`buddy train router`, `correction`, `predictor`, `exits` and `duo`: data in, artifact out, and it serves."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from buddy_process import BUDDY, serving
from buddy_routing.router_config import read_router_config
from buddy_routing.train import batch_training
from buddy_server.cli import main
from buddy_server.engine.build import build_engine
from buddy_server.engine.settings import EngineSettings
from tiny_engine import save_character_tokenizer
from tiny_models import save_random_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
NUM_EXAMPLES = 200
TIMEOUT_S = 150


def save_chat_model(name: str, directory: Path) -> Path:
    """A tiny random model that a line break ends."""
    save_random_model(name, directory)
    save_character_tokenizer(directory)
    for file, changes in (
        ("config.json", {"eos_token_id": 1}),
        ("generation_config.json", {"eos_token_id": 1}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "\n"}),
    ):
        path = directory / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def save_conversations(path: Path) -> Path:
    rng = random.Random(0)
    lines = []
    for _ in range(NUM_EXAMPLES):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        question = {"role": "user", "content": f"What is {a} + {b}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"{a + b}."}]}))
    path.write_text("\n".join(lines))
    return path


def train(*arguments: str | Path) -> list[str]:
    return ["train", *map(str, arguments), "--device", "cpu", "--dtype", "float32", "--num-rows", "2"]


def run(arguments: list[str]) -> None:
    done = subprocess.run([BUDDY, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr


def test_a_router_and_its_predictor_are_trained_by_two_commands_and_load(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_training, "CHECKPOINT_EVERY", 10)
    model, data = save_chat_model("qwen3", tmp_path / "model"), save_conversations(tmp_path / "data.jsonl")
    router = tmp_path / "router"
    common = ("--model", model, "--data", data, "--num-tokens", "128")
    training = train("router", *common, "--out", router, "--route-block", "16", "--epochs", "1")
    main(training)
    assert "is of a training with another model, other data or other settings" in refused(*training, "--rank", "8")
    main(train("predictor", *common, "--router", router, "--num-batches", "4"))
    built = build_engine(str(model), str(router), EngineSettings(), "cpu", "float32")
    assert built.info.has_predictor
    assert not built.info.router_id.startswith("prior")


def test_a_router_is_corrected_by_one_command_and_loads(refused: Callable[..., str], tmp_path: Path) -> None:
    model, data = save_chat_model("qwen3", tmp_path / "model"), save_conversations(tmp_path / "data.jsonl")
    router, out = tmp_path / "router", tmp_path / "corrected"
    common = ("--model", model, "--data", data, "--num-tokens", "128")
    with_adapter = ("--lora-rank", "2", "--objective", "cross_entropy")
    main(train("router", *common, "--out", router, "--route-block", "16", "--epochs", "0.1", *with_adapter))
    training = train("correction", *common, "--router", router, "--num-variations", "6", "--num-batches", "6")
    main([*training, "--out", str(out)])
    assert read_router_config(out).rank == 64
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert "is of a training with another model" in refused(*training, "--out", str(out), "--budgets", "0.5")
    for options, told in (
        (("--out", str(router)), "is the router to correct: choose another place"),
        (("--out", str(tmp_path / "other"), "--budgets", "1"), "budget 1 pays for 6 of 6 layers"),
        (("--out", str(tmp_path / "other"), "--budgets", "half"), "'half' is not a list of numbers"),
        (("--out", str(tmp_path / "other"), "--num-variations", "0"), "--num-variations is 0"),
    ):
        assert told in refused(*training, *options)
    built = build_engine(str(model), str(out), EngineSettings(), "cpu", "float32")
    assert built.info.router_id.startswith("learned:")


def test_exits_and_their_predictor_are_trained_by_two_commands_and_load(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_training, "CHECKPOINT_EVERY", 10)
    model, data = save_chat_model("llama", tmp_path / "model"), save_conversations(tmp_path / "data.jsonl")
    exits = tmp_path / "exits"
    training = train("exits", "--model", model, "--data", data, "--out", exits, "--num-tokens", "128", "--epochs", "1")
    main([*training, "--exits", "2,4"])
    assert list(exits.glob("**/events.out.tfevents.*"))
    assert "is of a training with another model, other data or other settings" in refused(*training, "--exits", "3")
    assert "exits [5] are not allowed" in refused(*training, "--exits", "5", "--out", str(tmp_path / "other"))
    assert "'2,x' is not a list of whole numbers" in refused(*training, "--exits", "2,x")
    built = build_engine(str(model), str(exits), EngineSettings(), "cpu", "float32")
    assert built.info.actions.exits == (2, 4)
    assert not built.info.has_predictor
    main(train("predictor", "--model", model, "--data", data, "--router", exits, "--num-tokens", "128"))
    built = build_engine(str(model), str(exits), EngineSettings(), "cpu", "float32")
    assert built.info.has_predictor


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_small_ffns_and_their_router_are_trained_by_one_command_and_load(
    lora_rank: int, refused: Callable[..., str], tmp_path: Path
) -> None:
    model, data = save_chat_model("qwen2", tmp_path / "model"), save_conversations(tmp_path / "data.jsonl")
    duo = tmp_path / "duo"
    training = train("duo", "--model", model, "--data", data, "--out", duo, "--num-tokens", "128", "--epochs", "1")
    main([*training, "--divisor", "4", "--route-block", "16", "--lora-rank", str(lora_rank)])
    assert list(duo.glob("**/events.out.tfevents.*"))
    assert "is of a training with another model, other data or other settings" in refused(*training, "--rank", "8")
    for option, told in (
        (("--divisor", "1"), "small FFNs of 1/1 are not allowed: give 2 to"),
        (("--random-share", "1"), "--random-share is 1.0, allowed is more than 0 and less than 1"),
        (("--lora-rank", "-1"), "--lora-rank is -1"),
    ):
        assert told in refused(*training, *option, "--out", str(tmp_path / "other"))
    built = build_engine(str(model), str(duo), EngineSettings(), "cpu", "float32")
    assert built.info.router_id.startswith("duo:")
    assert built.info.actions.num_actions == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_router_and_predictor_of_a_users_model_resume_after_a_kill_and_serve(name: str, tmp_path: Path) -> None:
    model = save_chat_model(name, tmp_path / "model")
    data = save_conversations(tmp_path / "data.jsonl")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sizes = ("--num-tokens", "128", "--route-block", "16", "--epochs", "12")
    run(train("router", "--model", model, "--data", data, "--out", whole, *sizes))
    killed = train("router", "--model", model, "--data", data, "--out", cut, *sizes)
    kill_after_a_checkpoint(killed, cut / "training.safetensors")
    assert not (cut / "router.safetensors").exists()
    run(killed)
    resumed, uninterrupted = (load_file(directory / "router.safetensors") for directory in (cut, whole))
    assert all((resumed[name] == tensor).all() for name, tensor in uninterrupted.items())
    assert list(whole.glob("**/events.out.tfevents.*"))
    run(train("predictor", "--model", model, "--router", whole, "--data", data, "--num-tokens", "128"))
    with serving("--model", str(model), "--router", str(whole), "--dtype", "float32") as url:
        body = {"model": "model", "messages": [{"role": "user", "content": "What is 1 + 2?"}], "max_tokens": 4}
        half = httpx.post(f"{url}/v1/chat/completions", json={**body, "budget": 0.5}).json()["buddy"]
        assert (half["layers_per_token"], half["layers"]) == (3.0, 6)
        assert httpx.post(f"{url}/v1/chat/completions", json=body).json()["buddy"]["decided_by"] == "predictor"


def kill_after_a_checkpoint(arguments: list[str], checkpoint: Path) -> None:
    process = subprocess.Popen([BUDDY, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"text": "hi"}', "line 2: found keys ['text']; expected"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "line 2: message 1 has role 'robot'; allowed: system"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2: no message is the assistant's"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 has no text"),
    ],
)
def test_a_bad_line_is_named(line: str, told: str, tmp_path: Path) -> None:
    from buddy_routing.train.chat_data import DataError, read_conversations

    good = save_conversations(tmp_path / "data.jsonl").read_text().splitlines()[0]
    (tmp_path / "data.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_conversations(tmp_path / "data.jsonl")
    assert told in str(caught.value)
