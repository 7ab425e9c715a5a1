"""Times contenders in turn, round by round, so that a noisy machine affects all of them equally."""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from buddy_routing.embedded import MODEL_ID, embedded_router, model_directory
from buddy_server.bench.contender import Contender, PeerError, Timing, Tokens
from buddy_server.bench.llama_cpp_peer import LlamaCppPeer
from buddy_server.bench.names import DTYPES
from buddy_server.bench.ours import OurEngine
from buddy_server.bench.row import BenchRow, commit, machine
from buddy_server.bench.shapes import save_random_model
from buddy_server.bench.transformers_peer import TransformersPeer

MIXED = (1.0, 0.75, 0.5, 0.5)
NUM_CHECKED = 10
REST_S = 0.02
"""After a peer: its threads go on spinning for some milliseconds, for which the next would pay."""


@dataclass(frozen=True, slots=True)
class EngineBenchPlan:
    """Set `model` or `shape`, or neither for the embedded model."""

    model: str | None
    shape: str | None
    budgets: tuple[float, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    prompts: tuple[int, ...]
    new_tokens: int
    mixed: bool
    align: bool
    predict: bool
    rounds: int
    exits: tuple[int, ...] = ()
    small_ffns: int | None = None


def bench_engine(plan: EngineBenchPlan) -> Iterator[BenchRow]:
    """Yields rows as they are measured. Raises PeerError, and ValueError for the model."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for dtype in plan.dtypes:
            contenders = _contenders(plan, dtype, work)
            _check_same_model(contenders)
            for batch in plan.batches:
                for num_prompt in plan.prompts:
                    yield from _rows(plan, contenders, batch, num_prompt)


def _contenders(plan: EngineBenchPlan, dtype: str, work: Path) -> list[Contender]:
    """All contenders. The first is our engine at budget 1.0, the reference for speedups."""
    most = max(plan.batches)
    if plan.shape is not None:
        directory = work / "model"
        if not directory.exists():
            save_random_model(plan.shape, directory)
        ours = OurEngine.load(directory, None, dtype, DTYPES[dtype], most)
    else:
        directory = model_directory(plan.model)
        router = str(embedded_router()) if plan.model is None else None
        ours = OurEngine.load(directory, router, dtype, DTYPES[dtype], most)
    longest = max(plan.prompts) + plan.new_tokens
    if longest > ours.spec.max_context:
        raise ValueError(f"--prompt and --new-tokens make {longest} tokens, the model allows {ours.spec.max_context}")
    contenders: list[Contender] = [replace(ours, budgets=(budget,)) for budget in dict.fromkeys((1.0, *plan.budgets))]
    if plan.mixed:
        contenders.append(replace(ours, budgets=MIXED))
    if plan.align:
        shared = replace(ours, engine="buddy, aligned", align_paths=True)
        contenders += [replace(shared, budgets=(budget,)) for budget in plan.budgets if budget < 1]
    if plan.exits:
        leaving = OurEngine.load(directory, None, dtype, DTYPES[dtype], most, exits=plan.exits)
        leaving = replace(leaving, engine="buddy, exits")
        contenders += [replace(leaving, budgets=(budget,)) for budget in plan.budgets if budget < 1]
    if plan.small_ffns is not None:
        mixing = OurEngine.load(directory, None, dtype, DTYPES[dtype], most, small_ffns=plan.small_ffns)
        mixing = replace(mixing, engine="buddy, small FFNs")
        contenders += [replace(mixing, budgets=(budget,)) for budget in plan.budgets if budget < 1]
    if "llama.cpp" in plan.peers:
        if dtype == "fp32":
            raise PeerError("peer llama.cpp is timed in bf16 and int8 only")
        contenders.append(LlamaCppPeer(directory, dtype, work, most, longest))
    if "transformers" in plan.peers:
        contenders.append(TransformersPeer(directory))
    return contenders


def _rows(plan: EngineBenchPlan, contenders: Sequence[Contender], batch: int, num_prompt: int) -> Iterator[BenchRow]:
    prompts = _prompts(contenders, batch, num_prompt)
    for contender in contenders:
        contender.answer(prompts, min(8, plan.new_tokens))
    timings: list[list[Timing]] = [[] for _ in contenders]
    step_s: list[dict[int, float]] = []
    for _ in tqdm(range(plan.rounds), desc=f"batch {batch}, prompt {num_prompt}", unit="round"):
        if plan.predict and batch > 1:
            step_s.append(_step_seconds(_ours(contenders), prompts, plan.new_tokens))
        for contender, times in zip(contenders, timings, strict=True):
            times.append(contender.answer(prompts, plan.new_tokens))
            if not isinstance(contender, OurEngine):
                time.sleep(REST_S)
    speeds = [[t.num_decoded / t.decode_s if t.num_decoded else 0.0 for t in times] for times in timings]
    for contender, times, speed in zip(contenders, timings, speeds, strict=True):
        ours = contender if isinstance(contender, OurEngine) else None
        budgets = ours.budgets if ours else (1.0,)
        predicted = (
            [ours.predicted_s(t.layer_rows, batch, s) / t.decode_s for t, s in zip(times, step_s, strict=True)]
            if ours and step_s and ours.engine in ("buddy", "buddy, aligned")
            else []
        )
        yield BenchRow(
            engine=contender.engine,
            shape=plan.shape or plan.model or MODEL_ID,
            dtype=contender.dtype,
            batch=batch,
            budget=budgets[0] if len(budgets) == 1 else None,
            prompt_tokens=num_prompt,
            new_tokens=plan.new_tokens,
            decode_tokens_per_s=median(speed),
            prefill_tokens_per_s=median(batch * num_prompt / t.prefill_s for t in times),
            speedup=median(a / b for a, b in zip(speed, speeds[0], strict=True)) if all(speeds[0]) else None,
            ideal_speedup=ours.ideal_speedup if ours else None,
            rounds=plan.rounds,
            commit=commit(),
            machine=machine(),
            share_of_predicted=median(predicted) if predicted else None,
            arithmetic=ours.built.info.arithmetic if ours else None,
        )


def _step_seconds(ours: OurEngine, prompts: list[Tokens], new_tokens: int) -> dict[int, float]:
    """Seconds of a decode step at full depth, by number of rows, from 1 to all prompts."""
    seconds = {}
    for rows in range(1, len(prompts) + 1):
        timing = ours.answer(prompts[:rows], new_tokens)
        seconds[rows] = timing.decode_s * rows / timing.num_decoded
    return seconds


def _prompts(contenders: Sequence[Contender], count: int, num_tokens: int) -> list[Tokens]:
    rng = random.Random(0)
    vocab_size = _ours(contenders).spec.vocab_size
    return [tuple(rng.randrange(vocab_size) for _ in range(num_tokens)) for _ in range(count)]


def _ours(contenders: Sequence[Contender]) -> OurEngine:
    (first, *_) = contenders
    assert isinstance(first, OurEngine)
    return first


def _check_same_model(contenders: Sequence[Contender]) -> None:
    """Raises PeerError for a peer whose first tokens mostly differ from ours at full depth. A few may differ, because
    engines round in different places."""
    prompts = _prompts(contenders, NUM_CHECKED, 32)
    expected = [_ours(contenders).answer([prompt], 1).first_tokens[0] for prompt in prompts]
    for contender in contenders:
        if not isinstance(contender, OurEngine):
            said = [contender.answer([prompt], 1).first_tokens[0] for prompt in prompts]
            num_same = sum(a == b for a, b in zip(said, expected, strict=True))
            if num_same < NUM_CHECKED * 0.7:
                raise PeerError(
                    f"{contender.engine} agrees with us on {num_same} of {NUM_CHECKED} first tokens: another model"
                )
