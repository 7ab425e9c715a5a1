"""`buddy bench server` with a server of its own: what it measures of a tiny model, and that nothing is left of it."""

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from buddy_process import BUDDY
from buddy_server.bench.resident import process_tree
from buddy_server.cli import main
from fakes.serving import wait_until
from tiny_engine import TinySite, save_random_router, save_tiny_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySite:
    """With a context long enough for streams that last while another prompt comes in."""
    site = save_tiny_site(tmp_path_factory.mktemp("tiny"))
    config = site.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8192}))
    save_random_router(site.model, site.router)
    return site


@pytest.fixture(scope="module")
def others() -> list[int]:
    """The processes of earlier tests that are still in use."""
    return process_tree(os.getpid())


@pytest.fixture(scope="module")
def measured(tiny: TinySite, tmp_path_factory: pytest.TempPathFactory, others: list[int]) -> Path:
    """The directory that one run with every condition has written to."""
    out = tmp_path_factory.mktemp("measured")
    main(
        [
            *("bench", "server", "--model", str(tiny.model), "--router", str(tiny.router), "--dtype", "fp32"),
            *("--concurrency", "1,2", "--budgets", "1,0.5", "--prompt", "16", "--new-tokens", "5", "--rounds", "1"),
            *("--rate", "50", "--arrivals", "3", "--long-prompt", "100", "--shared-prefix", "64", "--memory", "20"),
            *("--json", str(out / "rows.jsonl"), "--plot", str(out / "plot.png")),
        ]
    )
    return out


@pytest.fixture(scope="module")
def rows(measured: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (measured / "rows.jsonl").read_text().splitlines()]


def of_kind(rows: list[dict[str, Any]], measured: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["measured"] == measured]


def test_every_condition_has_a_row_with_its_circumstances(rows: list[dict[str, Any]]) -> None:
    conditions = [(row["measured"], row.get("concurrency"), row["budget"]) for row in rows]
    both, streams = (1.0, 0.5), (1, 2)
    assert conditions == [
        *[("closed loop", n, budget) for n in streams for budget in both],
        *[("poisson", None, budget) for budget in both],
        *[("long prompt", n, budget) for n in streams for budget in both],
        *[("shared prefix", None, budget) for budget in both],
        *[("memory", 2, 1.0)] * 2,
    ]
    for row in rows:
        assert row["num_errors"] == 0
        assert row["dtype"] == "fp32"
        assert row["max_sequences"] == 33
        assert row["machine"].endswith("cores")


def test_the_server_is_compared_with_the_engine_alone(rows: list[dict[str, Any]]) -> None:
    for row in of_kind(rows, "closed loop"):
        assert row["num_requests"] == 2 * row["concurrency"]
        assert row["share_of_engine"] == pytest.approx(row["output_tokens_per_s"] / row["engine_tokens_per_s"])
        alone = row["concurrency"] == 1
        expected = pytest.approx(row["ttft_p50_ms"] - row["engine_prefill_ms"]) if alone else None
        assert row["ttft_over_prefill_ms"] == expected


def test_percentiles_are_in_order(rows: list[dict[str, Any]]) -> None:
    for row in of_kind(rows, "closed loop") + of_kind(rows, "poisson"):
        for name in ("ttft", "itl", "e2e"):
            percentiles = [row[f"{name}_p{percent}_ms"] for percent in (50, 95, 99)]
            # On a busy machine a short answer may come in one piece, which leaves no gaps.
            if name != "itl" or percentiles != [None] * 3:
                assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2]


def test_a_long_prompt_is_measured_by_the_gaps_of_the_others(rows: list[dict[str, Any]]) -> None:
    for row in of_kind(rows, "long prompt"):
        assert row["num_requests"] == row["concurrency"] + 1
        assert row["long_prompt_tokens"] == 100
        assert row["itl_p99_over_median"] == pytest.approx(row["itl_p99_ms"] / row["calm_itl_p50_ms"])


def test_a_shared_prefix_gives_the_same_text(rows: list[dict[str, Any]]) -> None:
    for row in of_kind(rows, "shared prefix"):
        assert row["same_text"] is True
        assert row["second_ttft_ratio"] == pytest.approx(row["second_ttft_ms"] / row["first_ttft_ms"])


def test_memory_is_that_of_the_server(rows: list[dict[str, Any]]) -> None:
    before, after = of_kind(rows, "memory")
    assert (before["num_requests"], after["num_requests"]) == (0, 20)
    assert after["peak_resident_mib"] >= after["resident_mib"] > 50
    assert after["weights_mib"] < after["kv_cache_mib"]


def test_the_picture_is_drawn_and_no_process_is_left(measured: Path, others: list[int]) -> None:
    assert (measured / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert process_tree(os.getpid()) == others


def test_ctrl_c_ends_the_server_too(tiny: TinySite) -> None:
    command = [BUDDY, "bench", "server", "--model", str(tiny.model), "--router", str(tiny.router)]
    small = ["--concurrency", "1", "--prompt", "16", "--new-tokens", "5", "--rounds", "100000"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        bench = subprocess.Popen([*command, *small], stdout=log, stderr=log)
        try:
            wait_until(lambda: "condition/s" in _text(log), timeout_s=60)
            tree = process_tree(bench.pid)
            assert len(tree) > 1
            bench.send_signal(signal.SIGINT)
            assert bench.wait(timeout=90) == 130
        finally:
            bench.kill()
            bench.wait()
        assert "Traceback" not in _text(log)
    assert not any(process_tree(pid) for pid in tree)


def _text(log: Any) -> str:
    log.seek(0)
    return log.read()
