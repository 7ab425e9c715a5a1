"""The plan of `buddy train exits`; imports no torch, so that a command line can be built from it."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import dataclass
from pathlib import Path

from buddy_routing.train.plan_fields import add_plan, add_training_inputs, check_positive, read_plan


@dataclass(frozen=True, slots=True)
class ExitsPlan:
    """How to train exits; OPTIONS explains each field. `exits` are numbers of layers, as in ActionSpace."""

    exits: tuple[int, ...]
    epochs: float = 2.0
    num_rows: int = 8
    num_tokens: int = 512
    learning_rate: float = 5e-4
    seed: int = 0


OPTIONS = {
    "epochs": "how often to see the data",
    "num_rows": "rows of packed examples in a batch",
    "num_tokens": "tokens in a row; longer examples are cut",
    "learning_rate": "AdamW's, falling to zero as a cosine after a warm-up",
    "seed": "of everything random",
}


def add_arguments(parser: ArgumentParser) -> None:
    add_training_inputs(parser)
    parser.add_argument(
        "--exits",
        required=True,
        type=_numbers,
        metavar="E,E,...",
        help="where answers may leave the model: after so many layers; an exit costs one more",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the artifact goes")
    add_plan(parser, ExitsPlan, OPTIONS, {})


def plan_from(parsed: Namespace) -> ExitsPlan:
    """Raises ValueError naming a number out of range."""
    plan = read_plan(ExitsPlan, parsed)
    check_positive(plan, "epochs", "num_rows", "num_tokens", "learning_rate")
    return plan


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None
