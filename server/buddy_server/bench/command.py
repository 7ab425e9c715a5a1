"""`buddy bench`: from the command line to JSON lines and a table."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

PEERS = ("transformers", "llama.cpp")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
SHAPE_NAMES = ("16x256", "12x768", "24x896")


def add_engine_arguments(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    source.add_argument("--shape", choices=SHAPE_NAMES, help="layers x width of a model with random weights instead")
    parser.add_argument("--budgets", type=_budgets, default="1.0,0.75,0.5", help="default: %(default)s")
    parser.add_argument("--batch", type=_counts, default="1,8", help="requests side by side (default: %(default)s)")
    parser.add_argument("--dtype", type=_dtypes, default="bf16", help="of fp32, bf16, int8 (default: %(default)s)")
    parser.add_argument("--peers", type=_peers, default="", help=f"of {', '.join(PEERS)} (default: none)")
    parser.add_argument("--prompt", type=_counts, default="128", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--mixed", action="store_true", help="also a batch whose budgets take turns")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that all take part in (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line here")


def _budgets(text: str) -> tuple[float, ...]:
    budgets = tuple(map(float, text.split(",")))
    if not all(0 < budget <= 1 for budget in budgets):
        raise ArgumentTypeError(f"{text!r} has a budget that is not more than 0 and at most 1")
    return budgets


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(map(int, text.split(",")))
    if min(counts) < 1:
        raise ArgumentTypeError(f"{text!r} has a number under 1")
    return counts


def _dtypes(text: str) -> tuple[str, ...]:
    return _names(text, tuple(DTYPES))


def _peers(text: str) -> tuple[str, ...]:
    return _names(text, PEERS) if text else ()


def _names(text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in allowed:
            raise ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(allowed)}")
    return names


def run_engine(parsed: Namespace) -> None:
    """Raises ValueErrors of the model and of peers that are not installed; OSError of the files."""
    from buddy_server.bench.engine_bench import EngineBenchPlan, bench_engine
    from buddy_server.bench.row import BenchRow, markdown_table, write_row

    for name in ("rounds", "new_tokens"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(parsed, name)}, allowed is 1 or more")
    plan = EngineBenchPlan(
        model=parsed.model,
        shape=parsed.shape,
        budgets=parsed.budgets,
        batches=parsed.batch,
        dtypes=parsed.dtype,
        peers=parsed.peers,
        prompts=parsed.prompt,
        new_tokens=parsed.new_tokens,
        mixed=parsed.mixed,
        rounds=parsed.rounds,
    )
    rows: list[BenchRow] = []
    for row in bench_engine(plan):
        rows.append(row)
        if parsed.json:
            write_row(parsed.json, row, first=len(rows) == 1)
    print(f"commit {rows[0].commit or 'unknown'}, {rows[0].machine}\n\n{markdown_table(rows)}")
