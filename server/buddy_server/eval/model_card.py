"""Measures the embedded model and writes its card: figures come from here, words from the template."""

import json
from dataclasses import asdict
from importlib import resources
from string import Template

from buddy_routing.budget import num_run_layers
from buddy_routing.tasks import FAMILIES
from buddy_routing.train.corpus import Corpus
from buddy_routing.train.demo_plan import WIKITEXT, DemoPlan
from buddy_server.engine.build import build_engine
from buddy_server.engine.settings import EngineSettings
from buddy_server.eval.quality import TaskResult, bits_per_byte, story_obedience, task_accuracy
from buddy_server.tokenizer import ChatTokenizer

BUDGETS = (1.0, 0.75, 0.5)
TASKS_PER_FAMILY = 100
NUM_HELDOUT_STORIES = 60
NUM_WIKITEXT_CHARS = 100_000
EVAL_SEED = 0


def write_model_card(plan: DemoPlan) -> None:
    """Measure `plan.out` and write MODEL_CARD.md and results.jsonl into it."""
    results: list[TaskResult] = []
    lines: list[str] = []
    for router in (str(plan.out / "router"), "prior:ppl"):
        built = build_engine(str(plan.out / "model"), router, EngineSettings())
        tokenizer = ChatTokenizer.from_directory(built.directory)
        # At full depth all routers are the same.
        for budget in BUDGETS if router != "prior:ppl" else BUDGETS[1:]:
            num_run = num_run_layers(budget, built.info.num_layers)
            found = task_accuracy(built, tokenizer, num_run, TASKS_PER_FAMILY, EVAL_SEED)
            results += found
            method = router.removeprefix(f"{plan.out}/")
            lines += [json.dumps({"method": method, **asdict(row)}) for row in found]
    (plan.out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stories = Corpus(plan.data, "heldout").tiny_stories[:NUM_HELDOUT_STORIES]
    wikitext = (plan.data / WIKITEXT).read_text(encoding="utf-8")[:NUM_WIKITEXT_CHARS]
    model = built.engine.runner.model
    told = story_obedience(built, tokenizer, built.info.num_layers, stories, EVAL_SEED)
    figures = {
        "story_obedience": f"{told:.0%}",
        "table": _table(results),
        "stories_bpb": f"{bits_per_byte(model, tokenizer, stories):.3f}",
        "wikitext_bpb": f"{bits_per_byte(model, tokenizer, [wikitext]):.3f}",
        "num_parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tasks_per_family": str(TASKS_PER_FAMILY),
        "num_stories": str(len(stories)),
        "pretrain_tokens": f"{plan.pretrain_tokens:,}",
        "tune_tokens": f"{plan.tune_tokens:,}",
        "pretrain_tokens_plain": str(plan.pretrain_tokens),
        "tune_tokens_plain": str(plan.tune_tokens),
        "router_steps": str(plan.router_steps),
        "depth_drop": str(plan.depth_drop),
        "routed_share": str(plan.routed_share),
        "seed": str(plan.seed),
    }
    template = resources.files("buddy_routing.embedded").joinpath("card_template.md").read_text(encoding="utf-8")
    (plan.out / "MODEL_CARD.md").write_text(Template(template).substitute(figures), encoding="utf-8")


def _table(results: list[TaskResult]) -> str:
    """One row a family: full depth, then learned router and prior:ppl at each smaller budget."""
    learned, static = results[: len(BUDGETS) * len(FAMILIES)], results[len(BUDGETS) * len(FAMILIES) :]
    columns = ["full depth"]
    columns += [f"{budget:g}, {name}" for budget in BUDGETS[1:] for name in ("learned", "prior:ppl")]
    lines = ["| family | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    sums = [0.0] * len(columns)
    for index, family in enumerate(FAMILIES):
        cells = [learned[index].accuracy]
        for number in range(1, len(BUDGETS)):
            cells += [
                learned[number * len(FAMILIES) + index].accuracy,
                static[(number - 1) * len(FAMILIES) + index].accuracy,
            ]
        sums = [total + cell for total, cell in zip(sums, cells, strict=True)]
        lines.append(f"| {family} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{total / len(FAMILIES):.1%}**" for total in sums) + " |")
    return "\n".join(lines)
