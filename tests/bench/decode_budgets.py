"""Decode speed of the engine by budget: what half of the layers saves on the wall clock.

    .venv/bin/python tests/bench/decode_budgets.py [--model PATH] [--json FILE]

Every round times all budgets in turn, so that a noisy machine is noisy for all of them; printed are medians of
rounds, and each budget's ratio to budget 1.0 as the median of per-round ratios. A run only counts when every token ran
the layers its budget buys.
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from statistics import median

import torch

from buddy_routing.budget import num_run_layers
from buddy_server.engine.build import BuiltEngine, build_engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from buddy_server.engine.settings import EngineSettings

BUDGETS = (1.0, 0.75, 0.5)
NUM_PROMPT, NUM_OUTPUT, NUM_ROUNDS = 64, 64, 7


def decode_tokens_per_s(built: BuiltEngine, batch: int, budget: float) -> float:
    """Tokens a second of `batch` sequences decoding side by side, prefill not counted."""
    engine, expected = built.engine, num_run_layers(budget, built.info.num_layers)
    # Every token is banned from ending the answer, so that all runs are of one length.
    bias = dict.fromkeys(engine.end_token_ids, -1e9)
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, logit_bias=bias)
    for index in range(batch):
        prompt = tuple(5 + (7 * index + position) % 90 for position in range(NUM_PROMPT))
        engine.add(GenerationRequest(str(index), "bench", prompt, expected, sampling))
    num_ended, num_tokens, started = 0, 0, 0.0
    while engine.has_work:
        events = [event for _, event in engine.step().events]
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        assert all(len(token.layers) == expected for token in tokens)
        if started:
            num_tokens += len(tokens)
        elif len(tokens) == batch:
            started = time.perf_counter()
        num_ended += sum(isinstance(event, FinishEvent) for event in events)
    assert num_ended == batch
    return num_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory (default: the embedded model)")
    parser.add_argument("--json", type=Path, help="append the results here, one object a line")
    parsed = parser.parse_args()
    built = build_engine(parsed.model, None, EngineSettings())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    conditions = {
        "model": built.info.model_id,
        "dtype": built.info.dtype,
        "router": built.info.router_id,
        "device": built.info.device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit.strip(),
    }
    print(json.dumps(conditions))
    print("| batch | budget | decode tokens/s | against 1.0 |\n|---:|---:|---:|---:|")
    for batch in (1, 8):
        for budget in BUDGETS:
            decode_tokens_per_s(built, batch, budget)
        rounds = [{b: decode_tokens_per_s(built, batch, b) for b in BUDGETS} for _ in range(NUM_ROUNDS)]
        for budget in BUDGETS:
            speed = median(one[budget] for one in rounds)
            ratio = median(one[budget] / one[1.0] for one in rounds)
            print(f"| {batch} | {budget:g} | {speed:.0f} | {ratio:.2f} |", flush=True)
            if parsed.json:
                row = {"batch": batch, "budget": budget, "decode_tokens_per_s": round(speed), "ratio": round(ratio, 3)}
                with parsed.json.open("a") as file:
                    file.write(json.dumps(conditions | row) + "\n")


if __name__ == "__main__":
    main()
