"""`buddy eval` on the embedded model and a handful of questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from buddy_routing.artifact import save_duo, save_exits
from buddy_routing.checkpoint import load_model
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.embedded import embedded_exits, embedded_model, embedded_router
from buddy_routing.exits import new_exits
from buddy_routing.router import DecisionModule
from buddy_routing.router_config import DuoConfig, ExitsConfig
from buddy_server.cli import main


def run_eval(*arguments: str) -> None:
    main(["eval", "--device", "cpu", "--dtype", "float32", *arguments])


@pytest.mark.parametrize(
    ("budgets", "methods"),
    [
        ((0.75,), ("router", "router:once", "random")),
        pytest.param(
            (0.875, 0.75), ("router", "router:once", "prior:taylor", "random", "bound"), marks=pytest.mark.slow
        ),
    ],
)
def test_methods_budgets_and_seeds_become_rows_a_table_and_plots(
    budgets: tuple[float, ...], methods: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "rows.jsonl", tmp_path / "report"
    run_eval(
        *("--budgets", ",".join(map(str, budgets)), "--methods", ",".join(methods)),
        *("--limit", "10", "--seed", "0,1", "--json", str(out), "--report", str(report)),
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert {"method", "budget", "task", "accuracy", "mean_depth", "n", "seed"} <= set(row)
        # The best path of a bound may be cheaper than its budget.
        assert row["mean_depth"] == pytest.approx(row["budget"]) or (
            row["method"] == "bound" and row["mean_depth"] < row["budget"]
        )
    runs = {(row["method"], row["budget"], row["seed"]) for row in rows}
    expected = {(method, budget, seed) for method in methods for budget in budgets for seed in (0, 1)}
    assert runs == expected | {("full", 1.0, 0), ("full", 1.0, 1)}
    assert len(rows) == len(runs) * 10
    once = [row["distinct_paths"] for row in rows if row["method"] == "router:once"]
    assert set(once) == {1.0}
    assert "| router | 0.75 |" in capsys.readouterr().out
    for name in ("report.md", "accuracy.png", "layer_use.png"):
        assert (report / name).stat().st_size > 100


def test_exits_are_measured_beside_a_router_at_what_they_cost(tmp_path: Path, refused: Callable[..., str]) -> None:
    loaded = load_model(embedded_model(), torch.float32, torch.device("cpu"))
    exits, out, text = tmp_path / "exits", tmp_path / "rows.jsonl", tmp_path / "text.txt"
    save_exits(exits, new_exits(loaded.model, (7, 11)), ExitsConfig(loaded.fingerprint, (7, 11)), torch.bfloat16)
    text.write_text("The dog sat in the sun.")
    common = ("--limit", "10", "--exits", str(exits), "--text", str(text), "--json", str(out))
    run_eval(*common, "--budgets", "0.75,0.7", "--methods", "exits,prior:ppl")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    depths = {(row["method"], row["budget"]): row["mean_depth"] for row in rows}
    assert depths["full", 1.0] == 1.0
    assert (depths["exits", 0.75], depths["exits", 0.7]) == (0.75, 0.5)
    assert (depths["prior:ppl", 0.75], depths["prior:ppl", 0.7]) == (0.75, 0.6875)
    bits = {row["bits_per_byte"] for row in rows if row["task"] == "text"}
    assert len(bits) == 5
    assert "budget 0.4 is outside" in refused("eval", *common, "--budgets", "0.75,0.4", "--methods", "exits")


def test_small_ffns_are_measured_with_their_oracle_and_their_tokens_are_rated(tmp_path: Path) -> None:
    loaded = load_model(embedded_model(), torch.float32, torch.device("cpu"))
    duo, out, report = tmp_path / "duo", tmp_path / "rows.jsonl", tmp_path / "report"
    small_ffns = new_small_ffns(loaded.model, 16)
    spec = loaded.model.with_small_ffns(small_ffns).spec
    decision = DecisionModule(2 * spec.kv_dim, spec.actions.num_scores)
    with torch.no_grad():
        decision.up.bias.copy_(torch.tensor([1.0, 0.5]).repeat(spec.num_layers - 2))
    config = DuoConfig(loaded.fingerprint, spec.num_layers, spec.kv_dim, 32, spec.small_ffn_size)
    save_duo(duo, DuoRouter(decision, small_ffns, "test"), config, torch.bfloat16)
    run_eval(
        *("--limit", "10", "--duo", str(duo), "--budgets", "0.9", "--methods", "duo,bound:duo"),
        *("--json", str(out), "--report", str(report)),
    )
    depths = {
        method: [row["mean_depth"] for row in map(json.loads, out.read_text().splitlines()) if row["method"] == method]
        for method in ("duo", "bound:duo")
    }
    for of_method in depths.values():
        assert len(of_method) == 10
        assert all(0.8 < depth <= 0.9 for depth in of_method)
    rated = [json.loads(line) for line in (report / "difficulty.jsonl").read_text().splitlines()]
    assert {token["question"] for token in rated} == set(range(10))
    for token in rated:
        assert token["budgets"] == [0.9, 1.0]
        assert token["difficulty"] == pytest.approx(max(0.0, token["nats"][0] - token["nats"][1]), abs=1e-6)
    page = (report / "difficulty.html").read_text()
    assert "<h2>duo</h2>" in page
    assert page.count("<span") == len(rated)


def test_resumed_evaluation_measures_what_its_rows_lack_and_keeps_the_rest(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "rows.jsonl"
    common = ("--budgets", "0.75", "--limit", "10", "--resume", "--json", str(out))
    run_eval(*common, "--methods", "prior:ppl")
    before = out.read_text()
    run_eval(*common, "--methods", "prior:ppl,random")
    assert out.read_text().startswith(before)
    added = [json.loads(line) for line in out.read_text()[len(before) :].splitlines()]
    assert [row["method"] for row in added] == ["random"] * 10
    other = refused("eval", *common[:2], "--limit", "20", *common[4:], "--methods", "prior:ppl")
    assert "was measured on 10 questions, now there are 20" in other


def test_questions_of_ones_own_are_answered_or_chosen(tmp_path: Path) -> None:
    tasks, out = tmp_path / "mine.jsonl", tmp_path / "rows.jsonl"
    rows = [
        {"task": "sum", "prompt": "What is 2 + 3?", "answer": "5"},
        {"task": "pick", "prompt": "What is 2 + 3?", "choices": ["2 + 3 = 5.", "grass umbrella"], "answer": 0},
    ]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    run_eval("--tasks", str(tasks), "--methods", "prior:ppl", "--budgets", "0.75", "--json", str(out))
    accuracy = {(r["method"], r["task"]): r["accuracy"] for r in map(json.loads, out.read_text().splitlines())}
    assert accuracy["full", "pick"] == 1.0
    assert set(accuracy) == {(m, t) for m in ("full", "prior:ppl") for t in ("sum", "pick")}


def test_an_artifact_that_changes_the_model_is_not_compared_with_others(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    changing = tmp_path / "duo"
    (changing / "adapter").mkdir(parents=True)
    told = refused("eval", "--limit", "1", "--duo", str(changing), "--methods", "duo")
    assert f"{changing} changes the model (adapter/)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "exits", "--model", str(embedded_model())), "method 'exits' needs exits: give --exits DIR"),
        (("--methods", "duo", "--model", str(embedded_model())), "method 'duo' needs small FFNs: give --duo DIR"),
        (("--methods", "exits", "--exits", str(embedded_router())), "needs an artifact of `buddy train exits`"),
        (("--methods", "router", "--router", str(embedded_exits())), "is another kind of artifact"),
        (("--methods", "router,magic"), "method 'magic' is unknown; allowed: router"),
        (("--budgets", "0.05"), "0.05"),
        (("--limit", "0"), "--limit is 0"),
        (("--families", "facts,magic"), "families magic are unknown; allowed: arithmetic"),
        (("--families", "facts", "--tasks", "{tasks}"), "--families are of the held-out tasks"),
        (("--resume",), "--resume needs --json FILE"),
        (("--resume", "--json", "rows.jsonl", "--text", "a.txt"), "--resume does not go with --text"),
        (("--dtype", "int8", "--methods", "bound"), "which has no int8"),
        (("--tasks", "/no/such/file"), "/no/such/file cannot be read"),
        (("--methods", "prompt-sets", "--tasks", "{tasks}"), "give --calibration FILE"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    refused: Callable[..., str], arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text('{"prompt": "hi", "answer": "hello"}')
    assert told in refused("eval", *(argument.format(tasks=tasks) for argument in arguments))
