"""`buddy train duo`, for any checkpoint, from a file of conversations."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from buddy_routing.adapter import ADAPTER_DIR, save_adapter
from buddy_routing.artifact import save_duo
from buddy_routing.checkpoint import load_model
from buddy_routing.embedded import model_directory
from buddy_routing.train.duo_plan import DuoPlan
from buddy_routing.train.duo_training import train_duo
from buddy_routing.train.router_job import endless, name_of, num_steps, out_of_memory_explained, read_examples


def make_duo(model: str | None, data: Path, out: Path, plan: DuoPlan, device: torch.device, dtype: torch.dtype) -> None:
    """Train and save an artifact in `out`, together with what resuming needs and TensorBoard's log. The small FFNs are
    saved in `dtype`.

    Raises DataError, CheckpointError, UnsupportedModelError and others (all of them ValueErrors), TrainingError.
    """
    # Before the model is loaded, because it assigns each process its GPU.
    process = PartialState(cpu=device.type == "cpu")
    directory = model_directory(model)
    examples = read_examples(data, directory, plan.num_tokens)
    loaded = load_model(directory, dtype, device)
    steps = num_steps(examples, plan)
    out.mkdir(parents=True, exist_ok=True)
    with out_of_memory_explained(plan):
        router, config = train_duo(
            loaded,
            lambda: endless(examples, plan.seed),
            plan,
            steps,
            out,
            log_directory=out,
            data_name=name_of(data),
        )
    if process.is_main_process:
        save_duo(out, router, config, dtype)
        if plan.lora_rank:
            save_adapter(out / ADAPTER_DIR, loaded.model, plan.lora_rank, str(directory))
        tqdm.write(f"{steps} steps; the small FFNs and their router are in {out}", file=sys.stderr)
    process.destroy_process_group()
