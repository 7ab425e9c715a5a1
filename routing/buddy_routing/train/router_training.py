"""Trains a Decision Module on a frozen model: at every budget, answer like the model at full depth.

The masks are the server's: prompts in route blocks, answers token by token, from causal features (design section 2).
The paper trains scorer and LoRA on next-token cross-entropy; a frozen backbone keeps budget 1.0 equal to the model,
and the full-depth distribution is the better teacher then.
"""

# B conversations, T tokens, V vocabulary, L layers, F width of one token's V

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from buddy_routing.artifact import RouterConfig
from buddy_routing.budget import ALWAYS_RUN
from buddy_routing.checkpoint import LoadedModel
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.model_spec import ModelSpec
from buddy_routing.prior import measure_prior
from buddy_routing.router import DecisionModule, LearnedRouter
from buddy_routing.train.document import Document
from buddy_routing.train.routed_paths import routed_paths
from buddy_routing.train.tokenizer import TrainingTokenizer
from buddy_routing.train.training_state import load_training_state, save_training_state

CHECKPOINT_EVERY = 50
PRIOR_DOCUMENTS = 16
POOL_BATCHES = 8


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """Budgets are drawn per conversation, uniform between `lowest_budget` of the layers and all but one."""

    num_steps: int
    seed: int = 0
    batch_size: int = 24
    max_tokens: int = 192
    learning_rate: float = 5e-3
    lowest_budget: float = 0.4
    rank: int = 32
    prior_weight: float = 0.1
    route_block: int = 128


@dataclass(frozen=True, slots=True)
class Conversations:
    """Padded on the right, which causal attention never sees."""

    tokens: Tensor  # [B, T] int64
    num_prompt: Tensor  # [B] int64
    counted: Tensor  # [B, T] bool: positions whose next token is part of the answer


def train_router(
    loaded: LoadedModel,
    documents: Iterator[Document],
    tokenizer: TrainingTokenizer,
    plan: RouterPlan,
    checkpoint: Path,
    decision: DecisionModule | None = None,
) -> tuple[LearnedRouter, RouterConfig]:
    """Goes on from `decision` if one is given, and resumes from `checkpoint` when it exists.

    The same seed gives the same router.
    """
    model, spec = loaded.model, loaded.model.spec
    device = model.inv_freq.device
    torch.manual_seed(plan.seed)
    calibration = padded([_encoded(next(documents), tokenizer, plan) for _ in range(PRIOR_DOCUMENTS)], device)
    prior = measure_prior(model, calibration.tokens, "ppl").to(device)
    if decision is None:
        features = first_layer_features(model, calibration.tokens)[calibration.counted]
        decision = new_decision_module(spec, features, plan.rank)
    router = LearnedRouter(decision, prior, plan.prior_weight, "training").to(device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    start = load_training_state(checkpoint, router, [optimizer]) if checkpoint.exists() else 0
    # Batches already trained on are drawn again, so that a resumed run goes on with those it would have seen.
    batches = islice(bucketed_batches(documents, tokenizer, plan, device), start, plan.num_steps)
    bar = tqdm(batches, initial=start, total=plan.num_steps, desc="router", unit="step", mininterval=5)
    mean_loss: float | None = None
    for step, batch in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 - step / plan.num_steps)
        budgets = random_budgets(plan, spec.num_layers, random.Random(f"{plan.seed}:{step}")).to(device)
        loss = distillation_loss(model, router, batch, budgets, plan.route_block)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        bar.set_postfix(kl=f"{mean_loss:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_training_state(checkpoint, router, [optimizer], step + 1)
    config = RouterConfig(
        base_fingerprint=loaded.fingerprint,
        num_layers=spec.num_layers,
        kv_dim=spec.kv_dim,
        rank=plan.rank,
        prior="ppl",
        prior_weight=plan.prior_weight,
        route_block=plan.route_block,
    )
    return router, config


def distillation_loss(
    model: RoutedDecoder, router: LearnedRouter, batch: Conversations, budgets: Tensor, route_block: int
) -> Tensor:
    """Mean KL(full depth || masked) over answer tokens; budgets [B] are layers to run."""
    begins = torch.zeros_like(batch.counted)
    in_answer = torch.arange(batch.tokens.shape[1], device=begins.device) >= batch.num_prompt[:, None]
    choose = routed_paths(router, begins, in_answer, budgets[:, None].expand_as(begins), route_block)
    with torch.no_grad():
        teacher = model.lm_head(model.dense(batch.tokens)[batch.counted]).log_softmax(-1)
    student = model.lm_head(model.dense(batch.tokens, choose)[batch.counted]).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def bucketed_batches(
    documents: Iterator[Document], tokenizer: TrainingTokenizer, plan: RouterPlan, device: torch.device
) -> Iterator[Conversations]:
    """Batches of conversations of about one length, so that little is padding, in random order."""
    rng = random.Random(plan.seed)
    while True:
        drawn = (_encoded(next(documents), tokenizer, plan) for _ in range(POOL_BATCHES * plan.batch_size))
        pool = sorted(drawn, key=lambda conversation: len(conversation[0]))
        starts = list(range(0, len(pool), plan.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield padded(pool[start : start + plan.batch_size], device)


def padded(conversations: Sequence[tuple[list[int], int]], device: torch.device) -> Conversations:
    """Conversations as (token ids, length of the prompt), side by side."""
    width = max(len(ids) for ids, _ in conversations)
    tokens = torch.zeros(len(conversations), width, dtype=torch.int64)
    counted = torch.zeros(len(conversations), width, dtype=torch.bool)
    for row, (ids, prompt_length) in enumerate(conversations):
        tokens[row, : len(ids)] = torch.tensor(ids)
        counted[row, prompt_length - 1 : len(ids) - 1] = True
    num_prompt = torch.tensor([prompt_length for _, prompt_length in conversations])
    return Conversations(tokens.to(device), num_prompt.to(device), counted.to(device))


def _encoded(document: Document, tokenizer: TrainingTokenizer, plan: RouterPlan) -> tuple[list[int], int]:
    """Token ids, cut at `max_tokens`, and the length of the prompt. Raises ValueError without a prompt."""
    if document.prompt is None:
        raise ValueError(f"a router is trained on conversations; this document has no prompt: {document.text[:60]!r}")
    prompt = tokenizer.encode_prompt(document.prompt, document.history)[: plan.max_tokens - 1]
    return [*prompt, *tokenizer.encode_answer(document.text)][: plan.max_tokens], len(prompt)


def first_layer_features(model: RoutedDecoder, tokens: Tensor) -> Tensor:
    """Features [B, T, 2F] of every token."""
    seen: list[Tensor] = []

    def keep(v: Tensor) -> Tensor:
        seen.append(causal_features(v))
        return torch.ones(*tokens.shape, model.spec.num_layers, device=tokens.device)

    with torch.no_grad():
        model.dense(tokens, keep)
    return seen[0]


def new_decision_module(spec: ModelSpec, features: Tensor, rank: int) -> DecisionModule:
    """One that scores all layers alike, with mean and spread of features [N, 2F] folded into its first layer."""
    decision = DecisionModule(spec.kv_dim, spec.num_layers, rank).to(features.device)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    with torch.no_grad():
        decision.down.weight.div_(std)
        decision.down.bias.sub_(decision.down.weight @ mean)
        decision.up.weight.zero_()
        decision.up.bias.zero_()
    return decision


def random_budgets(plan: RouterPlan, num_layers: int, rng: random.Random) -> Tensor:
    """[batch_size] int64, layers to run."""
    lowest = max(ALWAYS_RUN + 1, int(plan.lowest_budget * num_layers))
    return torch.tensor([rng.randint(lowest, num_layers - 1) for _ in range(plan.batch_size)])
