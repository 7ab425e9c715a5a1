"""LoRA adapters: what was trained is what is merged, and what PEFT itself loads."""

from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from buddy_routing.adapter import merge_adapter, save_adapter
from buddy_routing.checkpoint import load_model
from buddy_routing.router_config import ArtifactError
from buddy_routing.train.example import Example
from buddy_routing.train.router_plan import RouterPlan
from buddy_routing.train.router_training import train_router
from tiny_models import SHAPE, save_random_model
from tolerances import assert_close, assert_far

CPU = torch.device("cpu")
SIZE = (SHAPE["intermediate_size"], SHAPE["num_hidden_layers"])
EXAMPLES = [Example(tuple(range(n, n + 12)), 5) for n in range(1, 40)]
PLAN = RouterPlan(num_rows=2, num_tokens=24, rank=4, objective="cross_entropy", lora_rank=3, learning_rate=1e-2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_a_trained_adapter_is_merged_into_the_same_model_and_loads_in_peft(tmp_path: Path) -> None:
    save_random_model("qwen2", tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch.float32, CPU)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 20))
    with torch.inference_mode():
        before = loaded.model.lm_head(loaded.model.dense(tokens))
    train_router(loaded, cycle(EXAMPLES), PLAN, 6, tmp_path / "state.safetensors")
    with torch.inference_mode():
        trained = loaded.model.lm_head(loaded.model.dense(tokens))
    assert_far(before, trained, *SIZE)
    save_adapter(tmp_path / "adapter", loaded.model, PLAN.lora_rank, str(tmp_path / "model"))
    merged = load_model(tmp_path / "model", torch.float32, CPU).model
    merge_adapter(merged, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), str(tmp_path / "adapter")
    )
    with torch.inference_mode():
        assert_close(merged.lm_head(merged.dense(tokens)), trained, *SIZE)
        assert_close(theirs(tokens).logits, trained, *SIZE)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_random_model("qwen2", tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch.float32, CPU)
    train_router(loaded, cycle(EXAMPLES), PLAN, 1, tmp_path / "state.safetensors")
    save_adapter(tmp_path / "adapter", loaded.model, PLAN.lora_rank, "model")
    save_random_model("qwen3", tmp_path / "other")
    other = load_model(tmp_path / "other", torch.float32, CPU).model
    with pytest.raises(ArtifactError, match="does not fit the model"):
        merge_adapter(other, tmp_path / "adapter")
