"""The plan of `buddy train predictor`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan


@dataclass(frozen=True, slots=True)
class PredictorPlan:
    """How to train a predictor; OPTIONS explains each field."""

    num_batches: int = 200
    num_rows: int = 8
    num_tokens: int = 512
    lowest_budget: float = 0.5
    cost_weight: float = 0.4
    learning_rate: float = 3e-3
    rank: int = 32
    seed: int = 0


OPTIONS = {
    "num_batches": "batches of examples to measure at every depth; fewer when the data ends",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "lowest_budget": "smallest share of the layers that may be chosen",
    "cost_weight": "quality that full depth costs, less depth in proportion; 1 is a right answer",
    "learning_rate": "AdamW's",
    "rank": "width of each of the networks whose mean the predictor is",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument(
        "--router", required=True, type=Path, metavar="DIR", help="its router or exits; the predictor joins them"
    )
    add_plan(parser, PredictorPlan, OPTIONS, {})


def plan_from(parsed: Namespace) -> PredictorPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(PredictorPlan, parsed)
    check_positive(plan, "num_batches", "num_rows", "num_tokens", "learning_rate", "rank")
    if plan.cost_weight < 0:
        raise ValueError(f"--cost-weight is {plan.cost_weight}, allowed is 0 or more")
    if not 0 < plan.lowest_budget <= 1:
        raise ValueError(f"--lowest-budget is {plan.lowest_budget}, allowed is more than 0, up to 1")
    return plan
