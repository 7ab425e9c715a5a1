"""The plan of `buddy train predictor`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan


@dataclass(frozen=True, slots=True)
class PredictorPlan:
    """How to train a predictor; OPTIONS explains each field."""

    num_batches: int = 150
    num_rows: int = 8
    num_tokens: int = 512
    cost_weight: float = 1.0
    lowest_budget: float = 0.625
    num_steps: int = 2000
    learning_rate: float = 3e-3
    group: int = 16
    entropy_weight: float = 0.1
    rank: int = 32
    seed: int = 0


OPTIONS = {
    "num_batches": "batches of examples to measure at every depth; fewer when the data ends",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "cost_weight": "reward lost at full depth, at less depth in proportion, in nats of an answer's likelihood",
    "lowest_budget": "smallest share of the layers that may be tried",
    "num_steps": "steps of the policy",
    "learning_rate": "AdamW's, falling to zero",
    "group": "depths tried on every example, whose rewards are compared",
    "entropy_weight": "reward for a policy that stays open",
    "rank": "width of the predictor",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument("--router", required=True, type=Path, metavar="DIR", help="its router; the predictor joins it")
    add_plan(parser, PredictorPlan, OPTIONS, {})


def plan_from(parsed: Namespace) -> PredictorPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(PredictorPlan, parsed)
    check_positive(plan, "num_batches", "num_steps", "num_rows", "num_tokens", "learning_rate", "rank")
    if plan.group < 2:
        raise ValueError(f"--group is {plan.group}, allowed is 2 or more: rewards are compared within it")
    return plan
