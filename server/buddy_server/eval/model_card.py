"""Measures the embedded model and writes its card: the figures come from here, the text from the template."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import resources
from itertools import chain
from statistics import mean
from string import Template

from buddy_routing.tasks import FAMILIES
from buddy_routing.train.corpus import Corpus
from buddy_routing.train.demo_plan import WIKITEXT, DemoPlan
from buddy_server.engine.build import assemble
from buddy_server.engine.routing import make_routing
from buddy_server.engine.served_model import load_served_model
from buddy_server.engine.settings import EngineSettings
from buddy_server.eval.evaluation import EvalPlan, evaluate
from buddy_server.eval.quality import bits_per_byte, story_obedience
from buddy_server.eval.questions import builtin_questions
from buddy_server.eval.row import EvalRow
from buddy_server.tokenizer import ChatTokenizer

RUNS = (("full", 1.0), ("router", 0.75), ("prior:ppl", 0.75), ("router", 0.5), ("prior:ppl", 0.5))
TASKS_PER_FAMILY = 100
NUM_HELDOUT_STORIES = 60
NUM_WIKITEXT_CHARS = 100_000
EVAL_SEED = 0


def write_model_card(plan: DemoPlan) -> None:
    """Measure `plan.out` and write MODEL_CARD.md and results.jsonl into it."""
    served = load_served_model(str(plan.out / "model"), str(plan.out / "router"))
    tokenizer = ChatTokenizer.from_directory(served.loaded.directory)
    asked = EvalPlan(
        methods=("router", "prior:ppl"),
        budgets=(0.75, 0.5),
        seeds=(EVAL_SEED,),
        router=str(plan.out / "router"),
        questions_of=partial(builtin_questions, TASKS_PER_FAMILY * len(FAMILIES), tokenizer=tokenizer),
    )
    rows = list(chain.from_iterable(evaluate(served, tokenizer, asked)))
    lines = [json.dumps(asdict(row)) for row in rows]
    (plan.out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stories = Corpus(plan.data, "heldout").tiny_stories[:NUM_HELDOUT_STORIES]
    wikitext = (plan.data / WIKITEXT).read_text(encoding="utf-8")[:NUM_WIKITEXT_CHARS]
    model = served.loaded.model
    routing, full_cost = make_routing("prior:ppl", served), model.spec.actions.full_cost
    engine = assemble(served, routing, EngineSettings()).engine
    told = story_obedience(engine, tokenizer, full_cost, stories, EVAL_SEED)
    figures = {
        "story_obedience": f"{told:.0%}",
        "table": _table(rows),
        "stories_bpb": f"{bits_per_byte(model, tokenizer, stories, routing.router, full_cost):.3f}",
        "wikitext_bpb": f"{bits_per_byte(model, tokenizer, [wikitext], routing.router, full_cost):.3f}",
        "num_parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tasks_per_family": str(TASKS_PER_FAMILY),
        "num_stories": str(len(stories)),
        "pretrain_tokens": f"{plan.pretrain_tokens:,}",
        "tune_tokens": f"{plan.tune_tokens:,}",
        "pretrain_tokens_plain": str(plan.pretrain_tokens),
        "tune_tokens_plain": str(plan.tune_tokens),
        "router_steps": str(plan.router_steps),
        "predictor_batches": str(plan.predictor_batches),
        "depth_drop": str(plan.depth_drop),
        "routed_share": str(plan.routed_share),
        "seed": str(plan.seed),
    }
    template = resources.files("buddy_routing.embedded").joinpath("card_template.md").read_text(encoding="utf-8")
    (plan.out / "MODEL_CARD.md").write_text(Template(template).substitute(figures), encoding="utf-8")


def _table(rows: Sequence[EvalRow]) -> str:
    """One row per family, one column per run."""
    accuracy = {(row.method, row.budget, row.task): row.accuracy for row in rows if row.accuracy is not None}
    names = ["full depth" if method == "full" else f"{budget:g}, {method}" for method, budget in RUNS]
    lines = ["| family | " + " | ".join(names) + " |", "|---|" + "---:|" * len(RUNS)]
    for family in FAMILIES:
        cells = [f"{accuracy[method, budget, family]:.0%}" for method, budget in RUNS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    means = [mean(accuracy[method, budget, family] for family in FAMILIES) for method, budget in RUNS]
    lines.append("| **mean** | " + " | ".join(f"**{one:.1%}**" for one in means) + " |")
    return "\n".join(lines)
