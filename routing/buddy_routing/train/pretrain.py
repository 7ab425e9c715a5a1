"""Next-token training of the embedded model, which prepares its layers for being skipped.

One loop serves both stages: pretraining keeps the learning rate constant after a warm-up, tuning lowers it to zero
(warmup-stable-decay), so that a longer pretraining continues from the same checkpoint. Pretraining drops layers at
random; tuning trains a router as well, so that the layers learn to be skipped where the router skips them.
"""

# B rows of documents end to end, T tokens, D model dim, V vocabulary, L layers

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from buddy_routing.action_space import ActionSpace
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.router import LearnedRouter
from buddy_routing.train.corpus import PackedTokens
from buddy_routing.train.routed_paths import cost_per_conversation, routed_paths
from buddy_routing.train.training_state import load_training_state, save_training_state

CHECKPOINT_EVERY = 50
LOSS_CHUNK_ROWS = 2048
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class FitPlan:
    """One stage. `final_lr_scale` 1 keeps the learning rate constant after the warm-up, 0 lowers it linearly to zero.

    With probability `routed_share` a batch runs the paths that the router chooses, each document at a separate budget
    of at least `lowest_budget`. With probability `depth_drop` any other batch runs a random half or more of the layers.
    """

    num_steps: int
    batch_size: int
    num_tokens: int
    learning_rate: float
    final_lr_scale: float
    warmup_steps: int
    depth_drop: float = 0.0
    routed_share: float = 0.0
    lowest_budget: float = 0.4
    route_block: int = 128
    weight_decay: float = 0.05


def fit(
    model: RoutedDecoder,
    data: PackedTokens,
    plan: FitPlan,
    checkpoint: Path,
    device: torch.device,
    seed: int,
    compile_layers: bool,
    router: LearnedRouter | None = None,
    run: str = "",
) -> None:
    """Train `model` in place, together with `router` if given, resuming from `checkpoint`, which contains both.

    Ctrl-C loses at most `CHECKPOINT_EVERY` steps. Raises OtherTrainingError for a checkpoint of another `run`, if that
    is given.
    """
    trained: nn.Module = model if router is None else nn.ModuleDict({"base": model, "router": router})
    trained.to(device).train()
    optimizers = make_optimizers(trained, plan)
    step = load_training_state(checkpoint, trained, optimizers, run)
    if compile_layers:
        # Per layer, not the whole model: dropped layers then cost nothing and never trigger a recompilation.
        for layer in model.blocks:
            layer.dense = torch.compile(layer.dense)  # type: ignore[method-assign]
    bar = tqdm(
        total=plan.num_steps * plan.batch_size * plan.num_tokens,
        initial=step * plan.batch_size * plan.num_tokens,
        desc=checkpoint.stem,
        unit="tok",
        unit_scale=True,
        smoothing=0.05,
        mininterval=5,
    )
    mean_loss: float | None = None
    while step < plan.num_steps:
        rng = random.Random(f"{seed}:{step}")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * lr_scale(plan, step)
        rows = data.batch(step, plan.batch_size, plan.num_tokens)
        tokens, begins, counted = (torch.from_numpy(array).to(device) for array in rows)
        with training_precision(device):
            hidden = run_batch(model, router, plan, tokens[:, :-1], begins[:, :-1], counted[:, :-1], rng)
            loss = next_token_loss(model, hidden, tokens, counted)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        bar.set_postfix(step=step, loss=f"{mean_loss:.3f}", refresh=False)
        bar.update(plan.batch_size * plan.num_tokens)
        if step % CHECKPOINT_EVERY == 0 or step == plan.num_steps:
            save_training_state(checkpoint, trained, optimizers, step, run)
    bar.close()
    for layer in model.blocks:
        layer.__dict__.pop("dense", None)


def run_batch(
    model: RoutedDecoder,
    router: LearnedRouter | None,
    plan: FitPlan,
    tokens: Tensor,
    begins: Tensor,
    counted: Tensor,
    rng: random.Random,
) -> Tensor:
    """Hidden states [B, T, D] of rows [B, T]: on the router's paths, with some layers dropped, or with all layers."""
    num_layers = model.spec.num_layers
    if router is None or rng.random() >= plan.routed_share:
        return model.dense(tokens, layers_on=random_depth(model.spec.actions, plan.depth_drop, rng))
    actions = model.spec.actions
    max_cost = cost_per_conversation(begins, actions, plan.lowest_budget, num_layers - 1, rng.getrandbits(63))
    return model.dense(tokens, routed_paths(router, actions, begins, counted, max_cost, plan.route_block))


def training_precision(device: torch.device) -> torch.autocast:
    """bf16 where it is fast. CPUs without matrix units multiply fp32 faster (247 against 140 GFLOP/s on the 2-core
    machine that trained the embedded model), and fp32 needs no casts."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def lr_scale(plan: FitPlan, step: int) -> float:
    """The factor on the learning rate at `step`: a linear warm-up, then constant or falling to `final_lr_scale`."""
    warm = min(1.0, (step + 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
    return warm * (1.0 - (1.0 - plan.final_lr_scale) * step / plan.num_steps)


def random_depth(actions: ActionSpace, depth_drop: float, rng: random.Random) -> list[bool] | None:
    """The layers that a batch runs: all, or with probability `depth_drop` a random half or more, the forced ones
    included."""
    if rng.random() >= depth_drop:
        return None
    num_layers = actions.num_layers
    num_free = rng.randint(num_layers // 2, num_layers - 1) - len(actions.forced)
    kept = actions.forced.union(rng.sample(actions.free, num_free))
    return [layer in kept for layer in range(num_layers)]


def next_token_loss(model: RoutedDecoder, hidden: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy of the counted next tokens: hidden [B, T, D], tokens and counted [B, T + 1]."""
    wanted = counted[:, 1:]
    rows, targets = hidden[wanted], tokens[:, 1:][wanted]
    total = hidden.new_zeros((), dtype=torch.float32)
    for some_rows, some_targets in zip(rows.split(LOSS_CHUNK_ROWS), targets.split(LOSS_CHUNK_ROWS), strict=True):
        logits = model.lm_head(some_rows)
        total = total + F.cross_entropy(logits.float(), some_targets, reduction="sum")
    return total / max(1, targets.numel())


def make_optimizers(trained: nn.Module, plan: FitPlan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and the router (Jordan et al. 2024; torch's own)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.named_parameters():
        (matrices if parameter.ndim == 2 and "layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def initialise(model: RoutedDecoder, seed: int) -> None:
    """Normal weights of 0.02; the two matrices that write to the residual stream are scaled down by depth (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * model.spec.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 * (depth_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                parameter.normal_(0.0, std, generator=generator)
