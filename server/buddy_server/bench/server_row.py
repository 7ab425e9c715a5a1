"""The results of `buddy bench server`, as JSON objects and tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What all conditions of one server share. None means unknown, for a server that the bench did not start."""

    shape: str
    dtype: str | None
    max_sequences: int | None
    max_step_tokens: int | None
    commit: str
    machine: str
    arithmetic: str | None = None


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Many requests: a closed loop of `concurrency` streams, or Poisson arrivals at `rate_per_s`.

    Percentiles are over the requests, or the gaps between arrivals of text, of all rounds; speeds and comparisons are
    medians of rounds. `share_of_engine` is output tokens per second relative to the engine alone in the same round, on
    the same prompts in consecutive batches; `ttft_over_prefill_ms`, at concurrency 1, is the time to the first token
    minus the engine's. Both are None without an engine to compare with. `client_cpu_us_per_token` is the CPU time that
    the client takes from the shared cores.
    """

    measured: str
    facts: Facts
    concurrency: int | None
    rate_per_s: float | None
    budget: float
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    num_errors: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
    e2e_p50_ms: float
    e2e_p95_ms: float
    e2e_p99_ms: float
    tokens_per_arrival: float
    client_cpu_us_per_token: float
    engine_tokens_per_s: float | None
    share_of_engine: float | None
    engine_prefill_ms: float | None
    ttft_over_prefill_ms: float | None
    rounds: int


@dataclass(frozen=True, slots=True)
class LongPromptRow:
    """A prompt of `long_prompt_tokens` arrives while `concurrency` streams decode. `itl_p99_ms` covers their gaps
    during its prefill, `calm_itl_p50_ms` those before, both over all rounds; `itl_p99_over_median` is the median of the
    per-round ratios."""

    measured: str
    facts: Facts
    concurrency: int
    budget: float
    prompt_tokens: int
    long_prompt_tokens: int
    num_requests: int
    num_errors: int
    long_ttft_p50_ms: float
    calm_itl_p50_ms: float
    itl_p99_ms: float
    itl_p99_over_median: float
    rounds: int


@dataclass(frozen=True, slots=True)
class SharedPrefixRow:
    """Three requests in sequence with the same first `prefix_tokens` tokens, new ones every round: the second continues
    differently, the third repeats the first. Times and ratios to the first are medians of rounds; `same_text` is
    whether every third got the same answer as its first. `cached_tokens` is what the server reports for the second, the
    minimum over rounds, or None."""

    measured: str
    facts: Facts
    budget: float
    prefix_tokens: int
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    num_errors: int
    first_ttft_ms: float
    second_ttft_ms: float
    repeated_ttft_ms: float
    second_ttft_ratio: float
    repeated_ttft_ratio: float
    same_text: bool
    cached_tokens: int | None
    rounds: int


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Proportional set size of the server's processes after `num_requests` short requests, and the peak so far.
    `weights_mib` and `kv_cache_mib` are computed from the shapes of matrices and cache."""

    measured: str
    facts: Facts
    concurrency: int
    budget: float
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    num_errors: int
    resident_mib: float
    peak_resident_mib: float
    weights_mib: float
    kv_cache_mib: float


ServerRow = LoadRow | LongPromptRow | SharedPrefixRow | MemoryRow


def flat(row: ServerRow) -> dict[str, Any]:
    """The row as one JSON object, with the facts among its fields."""
    fields = asdict(row)
    return fields | fields.pop("facts")


_COLUMNS: dict[type[ServerRow], tuple[str, ...]] = {
    LoadRow: (
        *("concurrency", "rate_per_s", "budget", "output_tokens_per_s", "requests_per_s"),
        *("ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms"),
        *("e2e_p50_ms", "e2e_p99_ms", "num_errors", "share_of_engine", "ttft_over_prefill_ms"),
    ),
    LongPromptRow: (
        *("concurrency", "budget", "long_prompt_tokens", "long_ttft_p50_ms", "calm_itl_p50_ms"),
        *("itl_p99_ms", "itl_p99_over_median", "num_errors"),
    ),
    SharedPrefixRow: (
        *("budget", "prefix_tokens", "first_ttft_ms", "second_ttft_ms", "repeated_ttft_ms", "second_ttft_ratio"),
        *("repeated_ttft_ratio", "same_text", "cached_tokens", "num_errors"),
    ),
    MemoryRow: (*("num_requests", "resident_mib", "peak_resident_mib", "weights_mib", "kv_cache_mib", "num_errors"),),
}
_UNITS = {"_per_s": "/s", "_ms": ", ms", "_mib": ", MiB"}


def markdown_tables(rows: Sequence[ServerRow]) -> str:
    """One table per kind of row, in order of first appearance."""
    tables = []
    for kind in dict.fromkeys(map(type, rows)):
        columns = ("shape", "dtype", *_COLUMNS[kind])
        lines = [f"| {' | '.join(map(_title, columns))} |", f"|---|---|{'---:|' * len(_COLUMNS[kind])}"]
        for row in rows:
            if type(row) is kind:
                fields = flat(row)
                lines.append(f"| {' | '.join(_shown(fields[column]) for column in columns)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _title(column: str) -> str:
    for ending, unit in _UNITS.items():
        if column.endswith(ending):
            return column.removesuffix(ending).replace("_", " ") + unit
    return column.replace("_", " ")


def _shown(value: _Cell) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
