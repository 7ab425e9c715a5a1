"""Training plans as command lines: a flag for every field of a frozen dataclass. Imports no torch."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def add_plan(
    parser: ArgumentParser, plan_type: type[Any], meanings: Mapping[str, str], choices: Mapping[str, Sequence[str]]
) -> None:
    """Add a flag for each field that has a default; `meanings` and `choices` are by field name."""
    for field in fields(plan_type):
        if field.default is MISSING:
            continue
        parser.add_argument(
            _flag(field.name),
            type=type(field.default),
            default=field.default,
            choices=choices.get(field.name),
            help=f"{meanings.get(field.name, '')} (default: %(default)s)".lstrip(),
        )


def add_training_inputs(parser: ArgumentParser) -> None:
    """Add the flags for the model and the conversations of a training."""
    parser.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="chat JSONL or Alpaca JSON")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the model")


def read_plan(plan_type: type[T], parsed: Namespace) -> T:
    """The plan given by a parsed command line."""
    return plan_type(**{field.name: getattr(parsed, field.name) for field in fields(plan_type)})  # type: ignore[arg-type]


def check_positive(plan: object, *names: str) -> None:
    """Raises ValueError naming a field that is not above 0."""
    for name in names:
        if getattr(plan, name) <= 0:
            raise ValueError(f"{_flag(name)} is {getattr(plan, name)}, allowed is more than 0")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
