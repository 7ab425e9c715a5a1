"""The plan of `buddy train correction`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan


@dataclass(frozen=True, slots=True)
class CorrectionPlan:
    """How to correct a router's scores; OPTIONS explains each field. `budgets` are those that paths are measured at."""

    budgets: tuple[float, ...]
    num_batches: int = 25
    num_rows: int = 8
    num_tokens: int = 512
    num_variations: int = 16
    learning_rate: float = 3e-3
    rank: int = 32
    seed: int = 0


OPTIONS = {
    "num_batches": "batches of examples to measure; fewer when the data ends",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "num_variations": "random variations of the router's path to measure at every budget",
    "learning_rate": "AdamW's, falling to zero",
    "rank": "width that the correction adds to the Decision Module",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument("--router", required=True, type=Path, metavar="DIR", help="the router to correct")
    parser.add_argument(
        "--budgets",
        default="0.75,0.625,0.5",
        type=_budgets,
        metavar="B,B,...",
        help="shares of the layers at which to measure paths (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the corrected router goes")
    add_plan(parser, CorrectionPlan, OPTIONS, {})


def plan_from(parsed: Namespace) -> CorrectionPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(CorrectionPlan, parsed)
    check_positive(plan, "num_batches", "num_rows", "num_tokens", "num_variations", "learning_rate", "rank")
    return plan


def _budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a list of numbers") from None
