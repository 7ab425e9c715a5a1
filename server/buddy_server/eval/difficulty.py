"""Token difficulty (Duo-LLM, arXiv 2410.10846): the loss that a token still loses when more is computed for it.

It is not the loss: a token that no depth predicts is not difficult, it is uncertain.
"""

# N tokens of answers, B budgets

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.path_source import decoder_for
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import LearnedRouter
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.routed_paths import routed_paths
from buddy_server.engine.served_model import ServedModel
from buddy_server.eval.evaluation import EvalPlan, question_batches
from buddy_server.tokenizer import ChatTokenizer

MOST_QUESTIONS = 40
MOST_NATS = 4.0
"""From where on a token has the strongest colour."""


@dataclass(frozen=True, slots=True)
class RatedToken:
    """A token of the reference answer to the `question`-th of those that are rated. `nats` are its losses at the
    `budgets`, in their order; `difficulty` is the loss at the smallest budget less the lowest of all of them."""

    method: str
    question: int
    token: str
    budgets: tuple[float, ...]
    nats: tuple[float, ...]
    difficulty: float


def token_difficulties(served: ServedModel, tokenizer: ChatTokenizer, plan: EvalPlan) -> Iterator[RatedToken]:
    """Those of the first seed's questions, a few of each task, for the methods of the plan that choose layers token by
    token: "router" and "duo"."""
    budgets = tuple(sorted({*plan.budgets, 1.0}))
    drawn = plan.questions_of(plan.seeds[0])
    questions = drawn[:: -(-len(drawn) // MOST_QUESTIONS)]
    source, batches = plan.source(served, tokenizer), question_batches(questions, served, tokenizer)
    for method in ("router", "duo"):
        if method not in plan.methods:
            continue
        routing = source.routing(method, plan.seeds[0])
        if not isinstance(routing.router, LearnedRouter):
            continue
        model = decoder_for(served.loaded.model, routing.router)
        number = -1
        for batch in batches:
            nats = torch.stack([_nats(model, routing.router, routing.route_block, batch, b) for b in budgets], 1)
            difficulty = nats[:, 0] - nats.amin(1)
            begins = batch.in_answer & ~F.pad(batch.in_answer[:, :-1], (1, 0))
            tokens = zip(batch.tokens[batch.in_answer].tolist(), begins[batch.in_answer].tolist(), strict=True)
            for (token, is_first), of_token, lost in zip(tokens, nats.tolist(), difficulty.tolist(), strict=True):
                number += is_first
                text = tokenizer.decode([token])
                yield RatedToken(method, number, text, budgets, tuple(of_token), lost)


@torch.inference_mode()
def _nats(model: RoutedDecoder, router: LearnedRouter, route_block: int, batch: ExampleBatch, budget: float) -> Tensor:
    """[N]: the loss of every token of the answers."""
    actions = model.spec.actions
    max_cost = torch.full_like(batch.tokens, actions.max_cost(budget))
    choose = routed_paths(router, actions, batch.begins, batch.in_answer, max_cost, route_block)
    hidden = model.dense(batch.tokens, choose, starts=conversation_starts(batch.begins))
    logits = model.lm_head(hidden[batch.counted]).float()
    return F.cross_entropy(logits, batch.tokens[batch.in_answer], reduction="none")


def write_difficulties(directory: Path, tokens: Iterator[RatedToken]) -> None:
    """Writes difficulty.jsonl and difficulty.html, where answers are coloured by it; nothing without tokens."""
    rated = list(tokens)
    if not rated:
        return
    lines = "".join(json.dumps(asdict(token)) + "\n" for token in rated)
    (directory / "difficulty.jsonl").write_text(lines, encoding="utf-8")
    (directory / "difficulty.html").write_text(_page(rated), encoding="utf-8")


def _page(rated: Sequence[RatedToken]) -> str:
    lowest = rated[0].budgets[0]
    parts = [
        "<!doctype html><meta charset=utf-8><title>Token difficulty</title>",
        "<style>body{font:16px/1.8 sans-serif;max-width:50em;margin:2em auto}",
        "span{border-radius:3px;white-space:pre-wrap}</style>",
        "<h1>Token difficulty</h1>",
        f"<p>The redder a token of a reference answer, the more loss it has at budget {lowest:g} that a larger budget "
        f"saves: full colour from {MOST_NATS:g} nats.</p>",
    ]
    for index, token in enumerate(rated):
        before = rated[index - 1] if index else None
        if before is None or before.method != token.method:
            parts.append(f"<h2>{html.escape(token.method)}</h2>")
        if before is None or (before.method, before.question) != (token.method, token.question):
            parts.append("<p>")
        strength = min(1.0, token.difficulty / MOST_NATS)
        losses = ", ".join(f"{budget:g}: {nats:.2f}" for budget, nats in zip(token.budgets, token.nats, strict=True))
        parts.append(
            f'<span style="background:rgba(220,40,20,{strength:.2f})" title="nats at {losses}">'
            f"{html.escape(token.token)}</span>"
        )
    return "\n".join(parts[:5]) + "".join(parts[5:]) + "\n"
