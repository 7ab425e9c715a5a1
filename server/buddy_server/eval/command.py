"""`buddy eval`: from the command line to JSON lines, a table and plots."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial
from pathlib import Path

CALIBRATION_QUESTIONS = 200


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    parser.add_argument("--router", metavar="DIR", help="router artifact (default: the embedded model's)")
    parser.add_argument(
        "--exits",
        metavar="DIR",
        help="artifact of `buddy train exits`, for exits and auto:exits (default: the embedded model's own)",
    )
    parser.add_argument(
        "--duo",
        metavar="DIR",
        help="artifact of `buddy train duo`, for duo and auto:duo (default: the embedded model's own)",
    )
    parser.add_argument("--budgets", type=_budgets, default="0.875,0.75,0.625,0.5", help="default: %(default)s")
    parser.add_argument(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        default="router,prior:cosine,prior:ppl,prior:taylor,prior:greedy,random",
        help="what to compare at each budget, besides full depth (default: %(default)s); "
        "also: router:once, router:aligned, router:zero-kv, auto, exits, auto:exits, duo, auto:duo, prompt-sets, "
        "bound, bound:duo",
    )
    parser.add_argument("--tasks", type=Path, metavar="FILE", help="JSONL of questions (default: held-out tasks)")
    parser.add_argument(
        "--families",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,...",
        help="only these families of the held-out tasks, such as facts,sorting",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="JSONL of other questions, for methods that learn from some"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text to measure bits per byte on, too")
    parser.add_argument("--limit", type=int, default=300, help="questions a seed (default: %(default)s)")
    parser.add_argument("--seed", type=_seeds, default="0", help="one, or several: 0,1,2 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line here")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs in --json FILE and add those it lacks; of the same model, router and questions",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.md and plots here")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "int8"))


def _budgets(text: str) -> tuple[float, ...]:
    budgets = tuple(map(float, text.split(",")))
    if not all(0 < budget <= 1 for budget in budgets):
        raise ArgumentTypeError(f"{text!r} has a budget that is not more than 0 and at most 1")
    return budgets


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def run(parsed: Namespace) -> None:
    """Raises ValueError for the model, the router, the methods or the questions; OSError for files."""
    from buddy_routing.embedded import embedded_duo, embedded_exits
    from buddy_routing.tasks import FAMILIES
    from buddy_server.engine.routing import default_router
    from buddy_server.engine.served_model import load_served_model
    from buddy_server.eval.difficulty import token_difficulties, write_difficulties
    from buddy_server.eval.evaluation import EvalPlan, evaluate
    from buddy_server.eval.methods import check_methods
    from buddy_server.eval.questions import builtin_questions, questions_from_file
    from buddy_server.eval.report import equal_depth_table, markdown_table, write_report
    from buddy_server.eval.row import read_rows, write_rows
    from buddy_server.tokenizer import ChatTokenizer

    check_methods(parsed.methods)
    if parsed.limit < 1:
        raise ValueError(f"--limit is {parsed.limit}, allowed is 1 or more")
    if parsed.families and parsed.tasks:
        raise ValueError("--families are of the held-out tasks, which --tasks FILE replaces")
    if parsed.resume and parsed.json is None:
        raise ValueError("--resume needs --json FILE, whose rows it continues")
    if parsed.resume and parsed.text:
        raise ValueError("--resume does not go with --text: rows do not record their text")
    if parsed.dtype == "int8" and (parsed.text or {"bound", "bound:duo", "router:zero-kv"} & set(parsed.methods)):
        raise ValueError("--text, the bounds and router:zero-kv run in plain torch, which has no int8")
    router = parsed.router or default_router(parsed.model)
    served = load_served_model(parsed.model, router, parsed.device, parsed.dtype)
    for budget in parsed.budgets:
        served.loaded.model.spec.actions.max_cost(budget)
    tokenizer = ChatTokenizer.from_directory(served.loaded.directory)
    if parsed.tasks is None:
        families = parsed.families or FAMILIES
        questions_of = partial(builtin_questions, parsed.limit, tokenizer=tokenizer, families=families)
        calibration = builtin_questions(CALIBRATION_QUESTIONS, 0, tokenizer, split="train")
    else:
        questions_of = partial(questions_from_file, parsed.tasks, parsed.limit, tokenizer=tokenizer)
        calibration = []
    if parsed.calibration:
        calibration = questions_from_file(parsed.calibration, CALIBRATION_QUESTIONS, 0, tokenizer)
    texts = [parsed.text.read_text(encoding="utf-8")] if parsed.text else []
    rows = read_rows(parsed.json) if parsed.resume and parsed.json.exists() else []
    plan = EvalPlan(
        parsed.methods,
        parsed.budgets,
        parsed.seed,
        router,
        questions_of,
        calibration,
        texts,
        tuple(rows),
        parsed.exits or (str(embedded_exits()) if parsed.model is None else None),
        parsed.duo or (str(embedded_duo()) if parsed.model is None else None),
    )
    if parsed.json:
        write_rows(parsed.json, rows, "w")
    for measured in evaluate(served, tokenizer, plan):
        rows += measured
        if parsed.json:
            write_rows(parsed.json, measured, "a")
    print("\n\n".join(filter(None, (markdown_table(rows), equal_depth_table(rows)))))
    if parsed.report:
        write_report(parsed.report, rows)
        if parsed.dtype != "int8":
            # They are rated in plain torch, which would be another model.
            write_difficulties(parsed.report, token_difficulties(served, tokenizer, plan))
