"""Compares the budgets that a predictor chose with fixed ones of the same mean depth, on the same questions."""

# R resamples, N questions of a task, M fixed budgets

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from buddy_server.eval.row import EvalRow, fixed_method

NUM_RESAMPLES = 2000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class EqualDepth:
    """An auto method's `accuracy` at its `mean_depth`, both means over tasks, and `fixed`, the accuracy of the fixed
    budgets at that depth, interpolated between the two nearest. 95 % of resampled questions give a difference from
    `lowest` to `highest`."""

    method: str
    num_questions: int
    mean_depth: float
    accuracy: float
    fixed: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class _Task:
    """The same questions, answered at the predictor's budgets and at each fixed one."""

    right: np.ndarray  # [N]
    depths: np.ndarray  # [N]
    fixed: np.ndarray  # [M, N]


def compare_at_equal_depth(rows: Sequence[EvalRow]) -> list[EqualDepth]:
    """One comparison for each auto method with two fixed budgets or more, full depth among them."""
    compared = []
    for method in dict.fromkeys(row.method for row in rows if row.budget is None):
        chosen = {(row.task, row.seed): row for row in rows if row.method == method and row.right}
        fixed: dict[float, dict[tuple[str, int], EvalRow]] = {}
        for row in rows:
            if row.method in ("full", fixed_method(method)) and row.depths and (row.task, row.seed) in chosen:
                fixed.setdefault(row.depths[0], {})[row.task, row.seed] = row
        complete = {depth: of_depth for depth, of_depth in sorted(fixed.items()) if len(of_depth) == len(chosen)}
        if len(complete) > 1:
            compared.append(_compare(method, _tasks(chosen, list(complete.values())), np.array(list(complete))))
    return compared


def _tasks(
    chosen: Mapping[tuple[str, int], EvalRow], fixed: Sequence[Mapping[tuple[str, int], EvalRow]]
) -> list[_Task]:
    """The questions of all seeds, by task."""
    tasks = []
    for task in dict.fromkeys(task for task, _ in chosen):
        runs = [run for run in chosen if run[0] == task]
        tasks.append(
            _Task(
                right=np.concatenate([chosen[run].right or () for run in runs]),
                depths=np.concatenate([chosen[run].depths or () for run in runs]),
                fixed=np.stack([np.concatenate([of_depth[run].right or () for run in runs]) for of_depth in fixed]),
            )
        )
    return tasks


def _compare(method: str, tasks: Sequence[_Task], fixed_depths: np.ndarray) -> EqualDepth:
    accuracy, depth, fixed = _means(tasks, [np.arange(len(task.right))[None] for task in tasks], fixed_depths)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(task.right), (NUM_RESAMPLES, len(task.right))) for task in tasks]
    resampled, _, resampled_fixed = _means(tasks, drawn, fixed_depths)
    lowest, highest = np.quantile(resampled - resampled_fixed, INTERVAL)
    return EqualDepth(
        method,
        sum(len(task.right) for task in tasks),
        float(depth[0]),
        float(accuracy[0]),
        float(fixed[0]),
        float(lowest),
        float(highest),
    )


def _means(
    tasks: Sequence[_Task], drawn: Sequence[np.ndarray], fixed_depths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy, mean depth and accuracy of the fixed budgets at that depth, each [R], of questions drawn by index
    [R, N] from each task."""
    accuracy = np.mean([task.right[index].mean(-1) for task, index in zip(tasks, drawn, strict=True)], 0)
    depth = np.mean([task.depths[index].mean(-1) for task, index in zip(tasks, drawn, strict=True)], 0)
    curve = np.mean([task.fixed[:, index].mean(-1) for task, index in zip(tasks, drawn, strict=True)], 0)  # [M, R]
    fixed = np.array([np.interp(x, fixed_depths, y) for x, y in zip(depth, curve.T, strict=True)])
    return accuracy, depth, fixed
