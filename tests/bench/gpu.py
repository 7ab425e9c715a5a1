"""Measures the GPU path on a card, or shows what can be shown without one:

    python tests/bench/gpu.py [--json FILE]       on a machine with a GPU, under 8 minutes
    python tests/bench/gpu.py --offline [--all]   anywhere

Needs torch, triton, transformers, safetensors and numpy, and no installation of this project. What it prints is in
README.md beside it.
"""

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

STARTED_S = time.perf_counter()
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "routing", "server", "tests", "tests/bench")]

import torch  # noqa: E402

from buddy_server.bench.row import commit, machine  # noqa: E402
from gpu_offline import run_offline  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="the GPU path on a card, or what can be shown without one")
    parser.add_argument("--offline", action="store_true", help="compile, prove and predict; needs no GPU")
    parser.add_argument("--all", action="store_true", help="offline: compile for all models, dtypes and batch sizes")
    parser.add_argument("--json", type=Path, help="file for the results, one object a line")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    print(f"commit {commit() or 'unknown'}, {machine()}, {packages}")
    if parsed.offline:
        holds = run_offline(parsed.all, parsed.json)
    elif parsed.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; --offline needs none", file=sys.stderr)
        return 2
    else:
        # Triton decides at its import whether it interprets, which --device cpu needs TRITON_INTERPRET=1 for.
        from gpu_on_card import run_on_card

        holds = run_on_card(torch.device(parsed.device), parsed.json, STARTED_S)
    print(f"{time.perf_counter() - STARTED_S:.0f} s; {'all checks hold' if holds else 'A CHECK FAILED'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
