"""The plan of `buddy train duo`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan


@dataclass(frozen=True, slots=True)
class DuoPlan:
    """How to train small FFNs and their router; OPTIONS explains each field."""

    epochs: float = 2.0
    num_rows: int = 8
    num_tokens: int = 512
    learning_rate: float = 4e-3
    divisor: int = 16
    random_share: float = 0.5
    rank: int = 32
    route_block: int = 128
    lowest_budget: float = 0.4
    lora_rank: int = 0
    seed: int = 0


OPTIONS = {
    "epochs": "how often to see the data",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "learning_rate": "AdamW's, falling to zero in each of the two parts",
    "divisor": "a small FFN has this part of the big one's width: 16 is 1/16",
    "random_share": "the part of the training in which choices are random; in the rest a router learns them",
    "rank": "width of the Decision Module",
    "route_block": "prompt tokens that share a path",
    "lowest_budget": "smallest share of the layers to train for; an example's is drawn between it and all but one",
    "lora_rank": "rank of LoRA that trains the model along, by the next token's cross-entropy; 0 leaves it as it is, "
    "and the rest learns to do what it does at full depth",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the artifact goes")
    add_plan(parser, DuoPlan, OPTIONS, {})


def plan_from(parsed: Namespace) -> DuoPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(DuoPlan, parsed)
    check_positive(plan, "epochs", "num_rows", "num_tokens", "learning_rate", "divisor", "rank", "route_block")
    if plan.lora_rank < 0:
        raise ValueError(f"--lora-rank is {plan.lora_rank}, allowed is 0 or more")
    if not 0 < plan.random_share < 1:
        raise ValueError(f"--random-share is {plan.random_share}, allowed is more than 0 and less than 1")
    if not 0 < plan.lowest_budget <= 1:
        raise ValueError(f"--lowest-budget is {plan.lowest_budget}, allowed is more than 0, up to 1")
    return plan
