"""`buddy bench engine`: what it writes, not how fast anything is."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from buddy_server.cli import main


def test_budgets_batches_dtypes_and_a_peer_become_rows_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    main(
        [
            *("bench", "engine", "--budgets", "0.5", "--batch", "1,4", "--dtype", "bf16,int8"),
            *("--peers", "transformers", "--mixed", "--predict"),
            *("--prompt", "16", "--new-tokens", "6", "--rounds", "1", "--json", str(out), "--plot", str(picture)),
        ]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    runs = [(row["engine"], row["dtype"], row["batch"], row["budget"]) for row in rows]
    printed = capsys.readouterr().out
    for row in rows:
        assert bool(row["arithmetic"]) == (row["engine"] == "buddy")
        assert not row["arithmetic"] or f"{row['dtype']} by {row['arithmetic']}" in printed
    ours = [(1.0, 0.5, None), ("bf16", "int8"), (1, 4)]
    assert [run for run in runs if run[0] == "buddy"] == [
        ("buddy", dtype, batch, budget) for dtype in ours[1] for batch in ours[2] for budget in ours[0]
    ]
    assert [run for run in runs if run[0] != "buddy"] == [("transformers", "bf16", n, 1.0) for n in (1, 4, 1, 4)]
    for row in rows:
        assert row["decode_tokens_per_s"] > 0
        assert row["prefill_tokens_per_s"] > 0
        assert row["machine"].endswith("cores")
        assert row["shape"] == "buddy-7m"
        assert (row["share_of_predicted"] is not None) == (row["engine"] == "buddy" and row["batch"] > 1)
    half = next(row for row in rows if row["budget"] == 0.5)
    assert 1.5 < half["ideal_speedup"] < 2
    assert "| buddy | buddy-7m | int8 | 4 | 16 | 0.5 |" in printed


def test_exits_are_timed_beside_the_router_and_read_less(tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ("bench", "engine", "--batch", "2", "--prompt", "16", "--new-tokens", "4", "--rounds", "1")
    main([*command, "--budgets", "0.5", "--exits", "7,11", "--predict", "--json", str(out)])
    rows = {(row["engine"], row["budget"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {("buddy", 1.0), ("buddy", 0.5), ("buddy, exits", 0.5)}
    assert rows["buddy, exits", 0.5]["ideal_speedup"] > 1.03 * rows["buddy", 0.5]["ideal_speedup"]
    assert rows["buddy, exits", 0.5]["share_of_predicted"] is None
    assert "exits [15] are not allowed" in refused(*command, "--exits", "15")
    assert "budget 0.5 is outside the allowed range" in refused(*command, "--exits", "11", "--budgets", "0.5")


def test_a_shape_has_random_weights_that_transformers_reads_as_we_do(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    shape = ("--shape", "16x256", "--peers", "transformers")
    main(["bench", "engine", *shape, "--batch", "1", "--new-tokens", "4", "--rounds", "1", "--json", str(out)])
    assert [json.loads(line)["shape"] for line in out.read_text().splitlines()] == ["16x256"] * 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--peers", "vllm"), "'vllm' is unknown; allowed: transformers, llama.cpp"),
        (("--dtype", "bf17"), "'bf17' is unknown; allowed: fp32, bf16, int8"),
        (("--budgets", "0.5,0"), "'0.5,0' has a budget"),
        (("--batch", "0"), "'0' has a number under 1"),
        (("--rounds", "0"), "--rounds is 0, allowed is 1 or more"),
        (("--budgets", "0.05"), "0.05"),
        (("--predict", "--new-tokens", "1"), "--new-tokens is 1, allowed with --predict is 2 or more"),
        (("--prompt", "1000"), "make 1128 tokens, the model allows 1024"),
        (("--dtype", "fp32", "--peers", "llama.cpp"), "llama.cpp is timed in bf16 and int8 only"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    refused: Callable[..., str], arguments: tuple[str, ...], told: str
) -> None:
    assert told in refused("bench", "engine", *arguments)


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama_cpp is installed, so nothing is missing")
def test_a_peer_that_is_not_installed_says_how_to_install_it(refused: Callable[..., str]) -> None:
    assert "pip install llama-cpp-python gguf" in refused("bench", "engine", "--peers", "llama.cpp")
