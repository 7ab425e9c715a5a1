"""`buddy eval` as users run it, on the embedded model and a handful of questions."""

import json
import subprocess
from pathlib import Path

import pytest

from buddy_process import BUDDY


def run_eval(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [BUDDY, "eval", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_methods_budgets_and_seeds_become_rows_a_table_and_plots(tmp_path: Path) -> None:
    out, report = tmp_path / "rows.jsonl", tmp_path / "report"
    done = run_eval(
        *("--budgets", "0.875,0.75", "--methods", "router,router:once,prior:taylor,random,bound"),
        *("--limit", "10", "--seed", "0,1", "--json", str(out), "--report", str(report)),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert {"method", "budget", "task", "accuracy", "mean_depth", "n", "seed"} <= set(row)
        assert row["mean_depth"] == pytest.approx(row["budget"])
    runs = {(row["method"], row["budget"], row["seed"]) for row in rows}
    methods = ("router", "router:once", "prior:taylor", "random", "bound")
    expected = {(method, budget, seed) for method in methods for budget in (0.875, 0.75) for seed in (0, 1)}
    assert runs == expected | {("full", 1.0, 0), ("full", 1.0, 1)}
    assert len(rows) == len(runs) * 10
    once = [row["distinct_paths"] for row in rows if row["method"] == "router:once"]
    assert set(once) == {1.0}
    assert "| router | 0.75 |" in done.stdout
    for name in ("report.md", "accuracy_depth.png", "accuracy_speed.png", "layer_use.png"):
        assert (report / name).stat().st_size > 100


def test_resumed_evaluation_measures_what_its_rows_lack_and_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    common = ("--budgets", "0.75", "--limit", "10", "--resume", "--json", str(out))
    assert run_eval(*common, "--methods", "prior:ppl").returncode == 0
    before = out.read_text()
    done = run_eval(*common, "--methods", "prior:ppl,random")
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith(before)
    added = [json.loads(line) for line in out.read_text()[len(before) :].splitlines()]
    assert [row["method"] for row in added] == ["random"] * 10
    other = run_eval(*common[:2], "--limit", "20", *common[4:], "--methods", "prior:ppl")
    assert other.returncode == 1
    assert "was measured on 10 questions, now there are 20" in other.stderr


def test_questions_of_ones_own_are_answered_or_chosen(tmp_path: Path) -> None:
    tasks, out = tmp_path / "mine.jsonl", tmp_path / "rows.jsonl"
    rows = [
        {"task": "sum", "prompt": "What is 2 + 3?", "answer": "5"},
        {"task": "pick", "prompt": "What is 2 + 3?", "choices": ["2 + 3 = 5.", "grass umbrella"], "answer": 0},
    ]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    done = run_eval("--tasks", str(tasks), "--methods", "prior:ppl", "--budgets", "0.75", "--json", str(out))
    assert done.returncode == 0, done.stderr
    accuracy = {(r["method"], r["task"]): r["accuracy"] for r in map(json.loads, out.read_text().splitlines())}
    assert accuracy["full", "pick"] == 1.0
    assert set(accuracy) == {(m, t) for m in ("full", "prior:ppl") for t in ("sum", "pick")}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "router,magic"), "method 'magic' is unknown; allowed: router"),
        (("--budgets", "0.05"), "0.05"),
        (("--limit", "0"), "--limit is 0"),
        (("--resume",), "--resume needs --json FILE"),
        (("--resume", "--json", "rows.jsonl", "--text", "a.txt"), "--resume does not go with --text"),
        (("--dtype", "int8", "--methods", "bound"), "which has no int8"),
        (("--tasks", "/no/such/file"), "/no/such/file cannot be read"),
        (("--methods", "prompt-sets", "--tasks", "{tasks}"), "give --calibration FILE"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text('{"prompt": "hi", "answer": "hello"}')
    done = run_eval(*(argument.format(tasks=tasks) for argument in arguments))
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
