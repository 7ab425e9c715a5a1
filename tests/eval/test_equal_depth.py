"""Chosen budgets against fixed ones of the same mean depth."""

from dataclasses import replace

import pytest

from buddy_server.eval.equal_depth import compare_at_equal_depth
from buddy_server.eval.report import equal_depth_table
from buddy_server.eval.row import EvalRow

EASY, HARD = (True,) * 40, (True, False) * 20
NONE = (False,) * 40


def row(method: str, budget: float | None, task: str, right: tuple[bool, ...], depth: float, seed: int = 0) -> EvalRow:
    accuracy = sum(right) / len(right)
    return EvalRow(method, budget, task, accuracy, depth, len(right), seed, right=right, depths=(depth,) * len(right))


def rows(seed: int = 0) -> list[EvalRow]:
    """Half the layers suffice for one task, and the other needs them all."""
    return [
        row("full", 1.0, "easy", EASY, 1.0, seed),
        row("full", 1.0, "hard", HARD, 1.0, seed),
        row("router", 0.5, "easy", EASY, 0.5, seed),
        row("router", 0.5, "hard", NONE, 0.5, seed),
        row("exits", 0.5, "easy", NONE, 0.5, seed),
        row("auto", None, "easy", EASY, 0.5, seed),
        row("auto", None, "hard", HARD, 1.0, seed),
    ]


def test_fixed_budgets_are_interpolated_at_the_mean_depth_that_was_chosen() -> None:
    (compared,) = compare_at_equal_depth([*rows(0), *rows(1)])
    assert (compared.method, compared.num_questions, compared.mean_depth) == ("auto", 160, 0.75)
    assert compared.accuracy == pytest.approx(0.75)
    assert compared.fixed == pytest.approx((0.5 + 0.75) / 2)
    assert 0 < compared.lowest < compared.accuracy - compared.fixed < compared.highest
    assert equal_depth_table(rows()).splitlines()[2].startswith("| auto | 80 | 0.750 | 75.0% | 62.5% | +12.5 | +")


def test_the_same_choice_for_all_questions_differs_in_nothing() -> None:
    same = [replace(one, method="auto", budget=None) for one in rows() if one.method == "router"]
    (compared,) = compare_at_equal_depth([*rows()[:4], *same])
    assert (compared.accuracy, compared.lowest, compared.highest) == (compared.fixed, 0, 0)


def test_exits_are_compared_with_exits_and_not_without_two_budgets() -> None:
    chosen = [replace(one, method="auto:exits") for one in rows() if one.budget is None]
    fixed = [row("exits", 0.5, task, NONE, 0.5) for task in ("easy", "hard")]
    (compared,) = compare_at_equal_depth([*rows()[:4], *fixed, *chosen])
    assert (compared.method, compared.fixed) == ("auto:exits", pytest.approx((0 + 0.75) / 2))
    assert compare_at_equal_depth([*fixed, *chosen]) == []


def test_rows_without_single_questions_are_not_compared() -> None:
    assert equal_depth_table([replace(one, right=None, depths=None) for one in rows()]) == ""
