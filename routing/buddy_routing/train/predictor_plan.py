"""What `buddy train predictor` is asked to do; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PredictorPlan:
    """How to train a predictor; OPTIONS says what each field means."""

    num_steps: int = 400
    num_rows: int = 8
    num_tokens: int = 512
    learning_rate: float = 3e-3
    group: int = 4
    quality_weight: float = 5.0
    cost_weight: float = 0.5
    entropy_weight: float = 0.01
    rank: int = 32
    lowest_budget: float = 0.4
    seed: int = 0


OPTIONS = {
    "num_steps": "batches to train on",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "learning_rate": "AdamW's, falling to zero",
    "group": "budgets tried on every example, whose rewards are compared",
    "quality_weight": "reward for a nat a token less of cross-entropy",
    "cost_weight": "reward lost at full depth; at less depth in proportion",
    "entropy_weight": "reward for a policy that stays open",
    "rank": "width of the predictor",
    "lowest_budget": "smallest share of the layers that may be tried",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    parser.add_argument("--router", required=True, type=Path, metavar="DIR", help="its router; the predictor joins it")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="chat JSONL or Alpaca JSON")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the model")
    for one in fields(PredictorPlan):
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=type(one.default),
            default=one.default,
            help=f"{OPTIONS[one.name]} (default: %(default)s)",
        )


def plan_from(parsed: Namespace) -> PredictorPlan:
    """Raises ValueError naming a number that is out of range."""
    plan = PredictorPlan(**{one.name: getattr(parsed, one.name) for one in fields(PredictorPlan)})
    for name in ("num_steps", "num_rows", "num_tokens", "learning_rate", "rank"):
        if getattr(plan, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(plan, name)}, allowed is more than 0")
    if plan.group < 2:
        raise ValueError(f"--group is {plan.group}, allowed is 2 or more: rewards are compared within it")
    return plan
