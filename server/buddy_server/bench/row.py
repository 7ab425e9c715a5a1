"""The results of a benchmark, as one JSON object per line."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Medians of rounds. `shape` is the model's name if its weights are not random; `budget` is None if several
    alternate. Speeds cover all `batch` requests together. `ideal_speedup` is what the weights read allow over budget
    1.0, `speedup` the median of per-round ratios to our own budget 1.0 (below 1 for a slower peer).
    `share_of_predicted`, if measured, is the speed relative to the prediction from the rows that ran each layer
    (OurEngine.predicted_s). `arithmetic` is our engine's, None for peers."""

    engine: str
    shape: str
    dtype: str
    batch: int
    budget: float | None
    prompt_tokens: int
    new_tokens: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    speedup: float | None
    ideal_speedup: float | None
    rounds: int
    commit: str
    machine: str
    share_of_predicted: float | None = None
    arithmetic: str | None = None


def write_row(path: Path, row: Mapping[str, object], first: bool) -> None:
    with path.open("w" if first else "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def markdown_table(rows: Sequence[BenchRow]) -> str:
    names = ["engine", "shape", "dtype", "batch", "prompt", "budget", "decode tokens/s", "prefill tokens/s"]
    names += ["speedup", "ideal", "of predicted"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * 3}{'---:|' * (len(names) - 3)}"]
    for row in rows:
        budget = "1, .75, .5, .5" if row.budget is None else f"{row.budget:g}"
        ratios = ["" if x is None else f"{x:.2f}" for x in (row.speedup, row.ideal_speedup, row.share_of_predicted)]
        speeds = [f"{row.decode_tokens_per_s:.0f}", f"{row.prefill_tokens_per_s:.0f}"]
        cells = [row.engine, row.shape, row.dtype, str(row.batch), str(row.prompt_tokens), budget, *speeds, *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(arithmetics: Iterable[tuple[str | None, str | None]]) -> str:
    """A line of what is measured where; `arithmetics` are dtypes and what our engine computes each with, or None."""
    named = dict.fromkeys(f"{dtype} by {arithmetic}" for dtype, arithmetic in arithmetics if arithmetic)
    return ", ".join((f"commit {commit() or 'unknown'}", machine(), *named))


@cache
def commit() -> str:
    """The commit of the working copy that the code runs from; empty outside of one."""
    directory = Path(__file__).parent
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    except OSError:
        return ""


@cache
def machine() -> str:
    """Processor and number of usable cores."""
    model = platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        named = [
            line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0] if named else model
    return f"{model}, {os.cpu_count()} cores"
