"""The results of an evaluation, as one JSON object per line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One method at one budget on one task. `budget` is None if the predictor chose; `mean_depth` is the measured share
    of the layers, `distinct_paths` the mean over answers; `tokens_per_s` covers the whole run that contains the row,
    prompts included. `right` tells for each question whether it was answered, `depths` the share of the layers that it
    was allowed; the questions of a seed are always in the same order. None means not measured: the task "text" has
    `bits_per_byte` and no accuracy."""

    method: str
    budget: float | None
    task: str
    accuracy: float | None
    mean_depth: float
    n: int
    seed: int
    distinct_paths: float | None = None
    tokens_per_s: float | None = None
    layer_use: tuple[float, ...] | None = None
    right: tuple[bool, ...] | None = None
    depths: tuple[float, ...] | None = None
    bits_per_byte: float | None = None


def fixed_method(method: str) -> str:
    """The method with fixed budgets whose paths are those of "auto" or "auto:..."."""
    return method.removeprefix("auto").removeprefix(":") or "router"


def read_rows(path: Path) -> list[EvalRow]:
    """Raises ValueError naming a line that is not a row of an evaluation."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(EvalRow(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} line {number} is not a row of buddy eval: {error}") from error
    return rows


def write_rows(path: Path, rows: Iterable[EvalRow], mode: Literal["w", "a"]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
