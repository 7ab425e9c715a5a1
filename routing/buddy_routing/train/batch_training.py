"""The training loop of routers, exits and small FFNs: packed batches, shared by the processes, with progress, resumed
if it was interrupted."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from buddy_routing.train.example import Example, ExampleBatch, packed_batches
from buddy_routing.train.training_state import load_training_state, save_training_state

CHECKPOINT_EVERY = 50


class BatchPlan(Protocol):
    """The plan of a training that consists of such batches."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def seed(self) -> int: ...


def train_on_batches(
    name: str,
    loss_module: nn.Module,
    inputs_of: Callable[[ExampleBatch, int], tuple[object, ...]],
    rate_of: Callable[[float], float],
    examples: Iterator[Example],
    plan: BatchPlan,
    num_steps: int,
    checkpoint: Path,
    run: str,
    device: torch.device,
    log_directory: Path | None = None,
    most_norm: float | None = None,
) -> None:
    """Train the parameters of `loss_module` in place with AdamW; resumes from `checkpoint` if it exists.

    `inputs_of` makes the module's inputs from a batch and a seed of the step. `rate_of` gives the share of the learning
    rate after a share of the steps. Gradients longer than `most_norm` are shortened to it. Under `accelerate launch`
    the processes share the batches. `log_directory` receives TensorBoard's files; `run` is a run_name. Raises
    OtherTrainingError for a checkpoint of another run.
    """
    tracker = "tensorboard" if log_directory else None
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=tracker, project_dir=log_directory)
    if log_directory:
        accelerator.init_trackers(name)
    optimizer = torch.optim.AdamW(loss_module.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    start = load_training_state(checkpoint, loss_module, [optimizer], run)
    loss_of, prepared = accelerator.prepare(loss_module, optimizer)
    # Batches already trained on are drawn again, so that a resumed run continues with the batches it would have seen.
    batches = packed_batches(examples, plan.num_rows, plan.num_tokens, plan.seed)
    share = islice(batches, accelerator.process_index, None, accelerator.num_processes)
    todo = islice(share, start, num_steps)
    bar = tqdm(
        todo,
        initial=start,
        total=num_steps,
        desc=name,
        unit="step",
        mininterval=5,
        disable=not accelerator.is_main_process,
    )
    mean_loss: float | None = None
    for step, host_batch in enumerate(bar, start + 1):
        batch = host_batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate_of((step - 1) / num_steps)
        seed = random.Random(f"{plan.seed}:{step}:{accelerator.process_index}").getrandbits(63)
        loss = loss_of(*inputs_of(batch, seed))
        accelerator.backward(loss)
        if most_norm is not None:
            accelerator.clip_grad_norm_(loss_module.parameters(), most_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        accelerator.log({"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]}, step=step)
        if (step % CHECKPOINT_EVERY == 0 or step == num_steps) and accelerator.is_main_process:
            save_training_state(checkpoint, loss_module, [optimizer], step, run)
    # Not the process group, which the next part of a training needs.
    for tracker in accelerator.trackers:
        tracker.finish()
