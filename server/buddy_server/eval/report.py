"""Renders an evaluation as a table and plots."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from buddy_server.eval.equal_depth import compare_at_equal_depth
from buddy_server.eval.row import EvalRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Summary:
    """A method at a budget, averaged over tasks; `spread` is the standard deviation over seeds, None for one seed."""

    method: str
    budget: float | None
    accuracy: float
    spread: float | None
    retention: float
    mean_depth: float
    distinct_paths: float | None
    tokens_per_s: float | None
    bits_per_byte: float | None


def summarise(rows: Sequence[EvalRow]) -> list[Summary]:
    """One summary per method and budget, in order of first appearance."""
    runs: dict[tuple[str, float | None], list[EvalRow]] = defaultdict(list)
    for row in rows:
        runs[row.method, row.budget].append(row)
    full = _accuracy_by_seed(runs["full", 1.0])
    summaries = []
    for (method, budget), members in runs.items():
        by_seed = _accuracy_by_seed(members)
        whole = mean(full.values())
        summaries.append(
            Summary(
                method,
                budget,
                accuracy=mean(by_seed.values()),
                spread=stdev(by_seed.values()) if len(by_seed) > 1 else None,
                retention=mean(by_seed.values()) / whole if whole else 0.0,
                mean_depth=mean(row.mean_depth for row in members),
                distinct_paths=_mean_known(row.distinct_paths for row in members),
                tokens_per_s=_mean_known(row.tokens_per_s for row in members),
                bits_per_byte=_mean_known(row.bits_per_byte for row in members),
            )
        )
    return summaries


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _accuracy_by_seed(rows: Sequence[EvalRow]) -> dict[int, float]:
    seeds: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.accuracy is not None:
            seeds[row.seed].append(row.accuracy)
    return {seed: mean(accuracies) for seed, accuracies in seeds.items()}


def markdown_table(rows: Sequence[EvalRow]) -> str:
    """One line per method and budget: accuracy is the mean over tasks, retention its share of full depth's accuracy."""
    lines = [
        "| method | budget | accuracy | retention | mean depth | paths an answer | tokens/s | bits/byte |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for s in summarise(rows):
        budget = "chosen" if s.budget is None else f"{s.budget:g}"
        accuracy = f"{s.accuracy:.1%}" + (f" ± {s.spread:.1%}" if s.spread is not None else "")
        cells = [s.method, budget, accuracy, f"{s.retention:.1%}", f"{s.mean_depth:.3f}"]
        for value, digits in ((s.distinct_paths, 1), (s.tokens_per_s, 0), (s.bits_per_byte, 3)):
            cells.append("" if value is None else f"{value:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bound_table(rows: Sequence[EvalRow]) -> str:
    """One line per budget at which both the router and the search bound are measured: the share of the gap between the
    best static baseline and the bound that the router closes."""
    lines = [
        "| budget | best static baseline | router | search bound | share of the gap closed |",
        "|---:|---:|---:|---:|---:|",
    ]
    summaries = summarise(rows)
    bounds = {s.budget: s.accuracy for s in summaries if s.method == "bound"}
    for router in (s for s in summaries if s.method == "router" and s.budget in bounds):
        statics = [s for s in summaries if s.budget == router.budget and is_static(s.method)]
        if not statics:
            continue
        best, bound = max(statics, key=lambda s: s.accuracy), bounds[router.budget]
        gap = bound - best.accuracy
        share = f"{(router.accuracy - best.accuracy) / gap:.0%}" if gap > 0 else ""
        cells = [f"{router.budget:g}", f"{best.accuracy:.1%} ({best.method})", f"{router.accuracy:.1%}"]
        lines.append(f"| {' | '.join([*cells, f'{bound:.1%}', share])} |")
    return "\n".join(lines)


def equal_depth_table(rows: Sequence[EvalRow]) -> str:
    """One line per auto method: how it compares with fixed budgets of the same mean depth. Empty if none can be
    compared."""
    compared = compare_at_equal_depth(rows)
    if not compared:
        return ""
    lines = [
        "| method | questions | mean depth | accuracy | fixed budgets of that depth | difference | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in compared:
        cells = [c.method, f"{c.num_questions}", f"{c.mean_depth:.3f}", f"{c.accuracy:.1%}", f"{c.fixed:.1%}"]
        cells += [f"{100 * (c.accuracy - c.fixed):+.1f}", f"{100 * c.lowest:+.1f} to {100 * c.highest:+.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_static(method: str) -> bool:
    """Whether a method runs the same layers for every prompt."""
    return method == "random" or method.startswith("prior:")


def write_report(directory: Path, rows: Sequence[EvalRow]) -> None:
    """Writes report.md, accuracy.png, layer_use.png and, with a predictor, auto_depth.png."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    tables = [markdown_table(rows)]
    if any(row.method == "bound" for row in rows):
        tables.append(bound_table(rows))
    if compared := equal_depth_table(rows):
        tables.append(f"Chosen budgets against fixed ones of the same mean depth:\n\n{compared}")
    (directory / "report.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    summaries = summarise(rows)
    _plot_accuracy(summaries, directory / "accuracy.png")
    _plot_layer_use(rows, directory / "layer_use.png")
    _plot_auto_depth(rows, directory / "auto_depth.png")


def _plot_accuracy(summaries: Sequence[Summary], path: Path) -> None:
    """Accuracy against what a token costs, and against measured speed."""
    from matplotlib import pyplot

    figure, (by_cost, by_speed) = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    _plot_curves(by_cost, summaries, "mean_depth")
    by_cost.set(xlabel="milli-layers of a token, as a share of full depth's", ylabel="accuracy")
    _plot_curves(by_speed, summaries, "tokens_per_s")
    by_speed.set(xlabel="tokens a second")
    for axes in (by_cost, by_speed):
        axes.grid(alpha=0.3)
    by_cost.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_curves(axes: "Axes", summaries: Sequence[Summary], x_name: str) -> None:
    from matplotlib import pyplot

    full = [s for s in summaries if s.method == "full"]
    for number, method in enumerate(dict.fromkeys(s.method for s in summaries if s.method != "full")):
        is_chosen = method.startswith("auto")
        points = [s for s in summaries if s.method == method and getattr(s, x_name) is not None]
        if not points:
            continue
        # Every fixed curve ends at full depth, where all methods are equal.
        points = sorted([*points, *([] if is_chosen else full)], key=lambda s: getattr(s, x_name))
        axes.errorbar(
            [getattr(s, x_name) for s in points],
            [s.accuracy for s in points],
            yerr=[s.spread or 0.0 for s in points],
            fmt="*" if is_chosen else "o-",
            # A method without speed has its colour, too, so that the others have the same in both plots.
            color=pyplot.get_cmap("tab20")(number % 20),
            label=method,
            capsize=2,
            linewidth=2.4 if method in ("router", "exits", "duo") else 1.0,
        )


def _plot_layer_use(rows: Sequence[EvalRow], path: Path) -> None:
    """How often the router runs each layer on each task, at its smallest budget."""
    from matplotlib import pyplot

    routed = [row for row in rows if row.method == "router" and row.layer_use]
    if not routed:
        return
    lowest = min(row.budget for row in routed if row.budget is not None)
    shown = [row for row in routed if row.budget == lowest]
    tasks = list(dict.fromkeys(row.task for row in shown))
    use = []
    for task in tasks:
        by_layer = zip(*(row.layer_use for row in shown if row.task == task and row.layer_use), strict=True)
        use.append([mean(layer) for layer in by_layer])
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(tasks) + 1.2))
    image = axes.imshow(use, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="layer", title=f"share of tokens that run a layer, budget {lowest:g}")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_auto_depth(rows: Sequence[EvalRow], path: Path) -> None:
    """The depth that the predictor chooses for each task."""
    from matplotlib import pyplot

    chosen = [row for row in rows if row.method == "auto"]
    if not chosen:
        return
    tasks = list(dict.fromkeys(row.task for row in chosen))
    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(tasks) + 1.2))
    axes.barh(tasks, [mean(row.mean_depth for row in chosen if row.task == task) for task in tasks])
    axes.set(xlabel="share of the layers that the Budget Predictor chooses", xlim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
