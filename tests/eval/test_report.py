"""What a report says of measured rows."""

from buddy_server.eval.report import bound_table, markdown_table, summarise
from buddy_server.eval.row import EvalRow

ROWS = [
    EvalRow("full", 1.0, "sums", 0.8, 1.0, 10, 0, 1.0, 100.0),
    EvalRow("full", 1.0, "words", 0.4, 1.0, 10, 0, 1.0, 100.0),
    EvalRow("full", 1.0, "text", None, 1.0, 1, 0, bits_per_byte=1.25),
    EvalRow("router", 0.5, "sums", 0.4, 0.5, 10, 0, 3.0, 180.0),
    EvalRow("router", 0.5, "words", 0.2, 0.5, 10, 0, 5.0, 180.0),
    EvalRow("router", 0.5, "sums", 0.5, 0.5, 10, 1, 3.0, 180.0),
    EvalRow("router", 0.5, "words", 0.5, 0.5, 10, 1, 5.0, 180.0),
    EvalRow("auto", None, "sums", 0.6, 0.7, 10, 0, 2.0, 150.0),
]


def test_accuracy_is_the_mean_over_tasks_and_retention_its_share_of_full_depth() -> None:
    full, router, auto = summarise(ROWS)
    assert (full.accuracy, full.retention, full.spread, full.bits_per_byte) == (0.6000000000000001, 1.0, None, 1.25)
    assert round(router.accuracy, 6) == 0.4
    assert router.spread is not None
    assert round(router.spread, 4) == 0.1414
    assert (round(router.retention, 4), router.distinct_paths, router.tokens_per_s) == (0.6667, 4.0, 180.0)
    assert (auto.budget, auto.accuracy) == (None, 0.6)


def test_table_has_a_line_a_run_and_leaves_out_what_was_not_measured() -> None:
    lines = markdown_table(ROWS).splitlines()[2:]
    assert lines[0] == "| full | 1 | 60.0% | 100.0% | 1.000 | 1.0 | 100 | 1.250 |"
    assert lines[1] == "| router | 0.5 | 40.0% ± 14.1% | 66.7% | 0.500 | 4.0 | 180 |  |"
    assert lines[2].startswith("| auto | chosen | 60.0% |")


def test_bound_table_compares_with_the_best_static_baseline_of_the_budget() -> None:
    rows = [
        EvalRow("full", 1.0, "sums", 0.9, 1.0, 10, 0),
        EvalRow("router", 0.5, "sums", 0.5, 0.5, 10, 0),
        EvalRow("router", 0.75, "sums", 0.7, 0.75, 10, 0),
        EvalRow("random", 0.5, "sums", 0.1, 0.5, 10, 0),
        EvalRow("prior:ppl", 0.5, "sums", 0.3, 0.5, 10, 0),
        EvalRow("router:once", 0.5, "sums", 0.45, 0.5, 10, 0),
        EvalRow("bound", 0.5, "sums", 0.8, 0.5, 10, 0),
    ]
    assert bound_table(rows).splitlines()[2:] == ["| 0.5 | 30.0% (prior:ppl) | 50.0% | 80.0% | 40% |"]
