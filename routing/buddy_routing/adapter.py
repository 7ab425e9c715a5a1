"""LoRA adapters of a router artifact: trained with PEFT, kept in its format, merged into the weights at load."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router_config import ArtifactError

ADAPTER_DIR = "adapter"
PREFIX = "base_model.model.model."
"""PEFT's name for the decoder inside a Hugging Face causal language model."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapter(model: RoutedDecoder, rank: int) -> list[nn.Parameter]:
    """Add LoRA of `rank`, scaled by 2, to every linear layer (as in the paper); returns the parameters to train."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_adapter(directory: Path, model: RoutedDecoder, rank: int, base: str) -> None:
    """Write the adapter of a model prepared by `add_adapter`, in PEFT's format; `base` names the base model."""
    from peft import LoraConfig, get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=TARGETS, base_model_name_or_path=base, task_type="CAUSAL_LM"
    )
    config.save_pretrained(str(directory))


@torch.no_grad()
def merge_adapter(model: RoutedDecoder, directory: Path) -> None:
    """Add the adapter's update to the weights: W + alpha / r x B A, computed in fp32. Does not need PEFT.

    Raises ArtifactError if the adapter does not fit the model.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{directory} cannot be read: {error}") from error
    scale = config["lora_alpha"] / config["r"]
    weights = dict(model.named_parameters())
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix(PREFIX).replace(".lora_A.", ".")
            if target not in weights or weights[target].shape != (b.shape[0], a.shape[1]):
                raise ArtifactError(f"{directory}: {name} does not fit the model")
            weight: Tensor = weights[target]
            update = scale * (b.float() @ a.float()).to(weight.device)
            weight.copy_(weight.float() + update)
