"""`buddy bench engine`: from the command line to JSON lines and a table."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from buddy_server.bench.names import DTYPES, PEERS, SHAPE_NAMES


def add_engine_arguments(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    source.add_argument("--shape", choices=SHAPE_NAMES, help="layers x width of a model with random weights instead")
    parser.add_argument("--budgets", type=budgets, default="1.0,0.75,0.5", help="default: %(default)s")
    parser.add_argument("--batch", type=counts, default="1,8", help="requests side by side (default: %(default)s)")
    parser.add_argument("--dtype", type=dtypes, default="bf16", help="of fp32, bf16, int8 (default: %(default)s)")
    parser.add_argument("--peers", type=_peers, default="", help=f"of {', '.join(PEERS)} (default: none)")
    parser.add_argument("--prompt", type=counts, default="128", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--mixed", action="store_true", help="also a batch whose budgets take turns")
    parser.add_argument(
        "--predict", action="store_true", help="also compare batches with what their row counts predict"
    )
    parser.add_argument("--align", action="store_true", help="also batches whose paths are aligned (align_paths)")
    parser.add_argument(
        "--exits", type=counts, default=(), metavar="E,E,...", help="also untrained exits after so many layers"
    )
    parser.add_argument(
        "--small-ffns", type=int, metavar="N", help="also untrained small FFNs, 1/N as wide as the big ones"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that all take part in (default: %(default)s)")
    add_output_arguments(parser)


def add_output_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (.png, .svg) here")


def budgets(text: str) -> tuple[float, ...]:
    values = tuple(map(float, text.split(",")))
    if not all(0 < value <= 1 for value in values):
        raise ArgumentTypeError(f"{text!r} has a budget that is not more than 0 and at most 1")
    return values


def counts(text: str) -> tuple[int, ...]:
    values = tuple(map(int, text.split(",")))
    if min(values) < 1:
        raise ArgumentTypeError(f"{text!r} has a number under 1")
    return values


def dtypes(text: str) -> tuple[str, ...]:
    return _names(text, tuple(DTYPES))


def _peers(text: str) -> tuple[str, ...]:
    return _names(text, PEERS) if text else ()


def _names(text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in allowed:
            raise ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(allowed)}")
    return names


def check_counts(parsed: Namespace, names: Sequence[str], least: int = 1) -> None:
    """Raises ValueError naming the flag."""
    for name in names:
        if getattr(parsed, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(parsed, name)}, allowed is {least} or more")


def check_plot(path: Path | None) -> None:
    """Raises, before anything is measured, ValueError if the plot could not be written and ModuleNotFoundError without
    matplotlib."""
    if path is not None:
        from matplotlib.figure import Figure

        kinds = sorted(Figure().canvas.get_supported_filetypes())
        if path.suffix.removeprefix(".") not in kinds:
            raise ValueError(f"--plot {path} is no picture; allowed are names that end with .{', .'.join(kinds)}")


def run_engine(parsed: Namespace) -> None:
    """Raises ValueError for the model and for peers that are not installed; OSError for files."""
    from buddy_server.bench.engine_bench import EngineBenchPlan, bench_engine
    from buddy_server.bench.plots import plot_engine
    from buddy_server.bench.row import BenchRow, conditions, markdown_table, write_row

    check_counts(parsed, ("rounds", "new_tokens"))
    if parsed.predict and parsed.new_tokens < 2:
        raise ValueError(f"--new-tokens is {parsed.new_tokens}, allowed with --predict is 2 or more")
    check_plot(parsed.plot)
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
        align=parsed.align,
        predict=parsed.predict,
        rounds=parsed.rounds,
        exits=parsed.exits,
        small_ffns=parsed.small_ffns,
    )
    rows: list[BenchRow] = []
    for row in bench_engine(plan):
        rows.append(row)
        if parsed.json:
            write_row(parsed.json, asdict(row), first=len(rows) == 1)
    if parsed.plot:
        plot_engine(rows, parsed.plot)
    print(f"{conditions((row.dtype, row.arithmetic) for row in rows)}\n\n{markdown_table(rows)}")
