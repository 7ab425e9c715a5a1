"""The command that measures the GPU path: what it shows without a GPU, and the way it takes on a card, on a CPU in
Triton's interpreter."""

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: the GPU path cannot be measured", allow_module_level=True)


from buddy_kernels.gpu import attention
from buddy_kernels.gpu.blocks import AttentionBlocks
from quick_interpreter import patch_language_once

SCRIPT = Path(__file__).with_name("gpu.py")


@pytest.mark.timeout(600)
def test_offline_kernels_compile_proofs_hold_and_the_roofline_is_printed(tmp_path: Path) -> None:
    """In a process of its own: here Triton interprets."""
    out, environment = tmp_path / "roofline.jsonl", os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), "--offline", "--json", str(out)]
    made = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "0 kernels spill" in made.stdout
    assert "all checks hold" in made.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["card"], row["model"], row["batch"]) for row in rows} == {
        (card, model, batch)
        for card in ("A100 80GB", "H100 SXM", "B200")
        for model in ("Llama-1B", "Llama-3-8B", "Qwen2.5-7B")
        for batch in (1, 8, 32)
    }
    assert all(0 < row["bandwidth"] < 1 and round(row["speedup"], 3) >= 1 for row in rows)


@pytest.mark.timeout(600)
def test_on_a_card_ops_steps_and_calls_are_checked_before_any_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    patch_language_once(monkeypatch)
    monkeypatch.setattr(attention, "attention_blocks", lambda *_: AttentionBlocks(16, 16, 2, 1, 1, 1))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--json", str(out)])
    assert runpy.run_path(str(SCRIPT), run_name="gpu_bench")["main"]() == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert "times say nothing" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["engine"] for row in rows].count("transformers") == 1
    assert {row["budget"] for row in rows} == {"1", "0.75", "0.5", "mixed"}
    assert all("interpreted" in row["device"] for row in rows)
