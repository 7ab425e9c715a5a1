"""The plan of `buddy train router`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from buddy_routing.router_config import FEATURES, INDICATORS, FeatureKind, Indicator
from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan

Objective = Literal["distill", "cross_entropy"]
MaskKind = Literal["served", "example"]


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """How to train a router; OPTIONS explains each field."""

    epochs: float = 2.0
    num_rows: int = 8
    num_tokens: int = 512
    learning_rate: float = 5e-3
    objective: Objective = "distill"
    masks: MaskKind = "served"
    features: FeatureKind = "mean_v+newest_v"
    prior: Indicator = "ppl"
    prior_weight: float = 0.1
    rank: int = 32
    route_block: int = 128
    lowest_budget: float = 0.4
    lora_rank: int = 0
    seed: int = 0


OPTIONS = {
    "epochs": "how often to see the data",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "learning_rate": "AdamW's, falling to zero",
    "objective": "KL to the model at full depth, or the next token's cross-entropy (the paper's)",
    "masks": "paths as the server routes, or one path an example (the paper's)",
    "features": "what the router sees of the first layer's V; the paper's is mean_v",
    "prior": "the static importance of layers that the scores are added to",
    "prior_weight": "weight of the prior; 0 is none",
    "rank": "width of the Decision Module",
    "route_block": "prompt tokens that share a path",
    "lowest_budget": "smallest share of the layers to train for; an example's is drawn between it and all but one",
    "lora_rank": "rank of LoRA that trains the model along (the paper's is 8, with cross_entropy); 0 is none",
    "seed": "of everything random",
}
_CHOICES = {
    "objective": get_args(Objective),
    "masks": get_args(MaskKind),
    "features": FEATURES,
    "prior": INDICATORS,
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the router artifact goes")
    add_plan(parser, RouterPlan, OPTIONS, _CHOICES)


def plan_from(parsed: Namespace) -> RouterPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(RouterPlan, parsed)
    check_positive(plan, "epochs", "num_rows", "num_tokens", "learning_rate", "rank", "route_block")
    if plan.lora_rank < 0:
        raise ValueError(f"--lora-rank is {plan.lora_rank}, allowed is 0 or more")
    if plan.lora_rank and plan.objective == "distill":
        raise ValueError("--lora-rank needs --objective cross_entropy: a model that changes cannot be its own teacher")
    if not 0 < plan.lowest_budget <= 1:
        raise ValueError(f"--lowest-budget is {plan.lowest_budget}, allowed is more than 0, up to 1")
    return plan
