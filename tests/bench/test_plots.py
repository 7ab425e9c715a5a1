"""Pictures of measured rows: that they are drawn, not how they look."""

import json
from pathlib import Path

import pytest

from buddy_server.bench.plots import plot_engine
from buddy_server.bench.row import BenchRow

MEASURED = Path(__file__).parent


@pytest.mark.parametrize("name", ["engine.jsonl", "peers_16x256.jsonl"])
def test_measured_rows_of_the_engine_become_a_picture(name: str, tmp_path: Path) -> None:
    rows = [BenchRow(**json.loads(line)) for line in (MEASURED / name).read_text().splitlines()]
    picture = tmp_path / "engine.png"
    plot_engine(rows, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
