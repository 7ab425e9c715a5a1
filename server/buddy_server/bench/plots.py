"""Plots of measured rows."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buddy_server.bench.row import BenchRow
from buddy_server.bench.server_row import LoadRow, ServerRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "buddy"


def plot_engine(rows: Sequence[BenchRow], path: Path) -> None:
    """Speedup over our budget 1.0 against the budget, one line per engine, dtype, batch and prompt; dotted, the speedup
    that the weights read allow. Peers, which have no budgets, are horizontal lines."""
    figure = _figure(9)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    peers: dict[str, float] = {}
    for row in rows:
        name = f"{row.dtype}, batch {row.batch}, prompt {row.prompt_tokens}"
        name = name if row.engine == OURS else f"{row.engine}, {name}"
        if row.budget is not None and row.speedup is not None and row.ideal_speedup is not None:
            lines[name].append((row.budget, row.speedup, row.ideal_speedup))
        elif row.engine != OURS and row.speedup is not None:
            peers[name] = row.speedup
    for name, points in lines.items():
        budgets, speedups, ideals = zip(*sorted(points), strict=True)
        (drawn,) = axes.plot(budgets, speedups, "o-", label=name)
        axes.plot(budgets, ideals, ":", color=drawn.get_color())
    for index, (name, speedup) in enumerate(peers.items(), len(lines)):
        axes.axhline(speedup, linestyle="--", linewidth=1, color=f"C{index}", label=name)
    title = f"{rows[0].shape}, {rows[0].new_tokens} new tokens, {rows[0].machine}"
    axes.plot([], [], ":", color="grey", label="ideal")
    axes.set(xlabel="budget (share of the layers)", ylabel="decode speed over our budget 1.0", title=title)
    _finish(axes)
    figure.savefig(path, dpi=110)


def plot_server(rows: Sequence[ServerRow], path: Path) -> None:
    """Time to the first token, inter-token latency and whole answers against output tokens per second: one line per
    dtype and budget, with the number of streams at each point and p99 dashed; Poisson arrivals as crosses."""
    figure = _figure(18)
    panels = figure.subplots(1, 3)
    loads = [row for row in rows if isinstance(row, LoadRow)]
    for axes, (name, what) in zip(
        panels,
        (("ttft", "time to first token"), ("itl", "inter-token latency"), ("e2e", "whole answer")),
        strict=True,
    ):
        for index, (dtype, budget) in enumerate(dict.fromkeys((row.facts.dtype, row.budget) for row in loads)):
            members = [row for row in loads if (row.facts.dtype, row.budget) == (dtype, budget)]
            _plot_latency(axes, members, name, f"{dtype or ''} budget {budget:g}".strip(), f"C{index}")
        axes.set(xlabel="output tokens a second", ylabel=f"{what}, ms (p50; p99 dashed)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        _finish(axes)
    first = loads[0]
    figure.suptitle(f"{first.facts.shape}, {first.prompt_tokens} + {first.new_tokens} tokens, {first.facts.machine}")
    figure.savefig(path, dpi=110)


def _plot_latency(axes: "Axes", rows: Sequence[LoadRow], name: str, label: str, color: str) -> None:
    closed = [row for row in rows if row.concurrency is not None]
    speeds = [row.output_tokens_per_s for row in closed]
    axes.plot(speeds, [getattr(row, f"{name}_p50_ms") for row in closed], "o-", color=color, label=label)
    axes.plot(speeds, [getattr(row, f"{name}_p99_ms") for row in closed], "--", color=color, linewidth=1)
    for row in closed:
        latency_ms = getattr(row, f"{name}_p50_ms")
        if latency_ms is not None:
            axes.annotate(f" {row.concurrency}", (row.output_tokens_per_s, latency_ms), color=color)
    poisson = [row for row in rows if row.rate_per_s is not None]
    if poisson:
        latencies = [getattr(row, f"{name}_p50_ms") for row in poisson]
        axes.plot([row.output_tokens_per_s for row in poisson], latencies, "x", color=color, label=f"{label}, Poisson")


def _figure(width: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.5), layout="tight")


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    # Outside the axes, so that it covers no line.
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
