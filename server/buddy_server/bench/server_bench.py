"""`buddy bench server`: starts the server to measure and runs the conditions in turn, round by round."""

import gc
import random
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

from buddy_routing.embedded import MODEL_ID
from buddy_server.bench.http_load import Target, closed_loop, run_undisturbed
from buddy_server.bench.load import ClosedLoop, PoissonArrivals
from buddy_server.bench.long_prompt import LongPrompt
from buddy_server.bench.memory import memory_rows
from buddy_server.bench.names import DTYPES
from buddy_server.bench.ours import OurEngine
from buddy_server.bench.row import commit, machine
from buddy_server.bench.served import ServedCheckpoint, served_model, served_shape, write_config
from buddy_server.bench.server_process import ServerBenchError, serving, wait_until_answering
from buddy_server.bench.server_row import Facts, ServerRow
from buddy_server.bench.shared_prefix import SUFFIX_TOKENS, SharedPrefix
from buddy_server.bench.site import BenchSite, Condition, Tally
from buddy_server.engine.settings import EngineSettings

SEED = 0
UNKNOWN_VOCAB = 256
"""Vocabulary for prompts to a server whose model is unknown: any real model has at least this many tokens."""
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ServerBenchPlan:
    """Set one of `model`, `shape` and `url`, or none for the embedded model. Counts of 0 skip a condition."""

    model: str | None
    shape: str | None
    router: str | None
    url: str | None
    api_key: str
    dtypes: tuple[str, ...]
    budgets: tuple[float, ...]
    concurrency: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    per_stream: int
    arrivals: int
    long_prompt: int
    shared_prefix: int
    memory: int
    rounds: int

    @property
    def most_prompt_tokens(self) -> int:
        prefixed = self.shared_prefix + SUFFIX_TOKENS if self.shared_prefix else 0
        return max(self.prompt_tokens, self.long_prompt, prefixed)


def bench_server(plan: ServerBenchPlan) -> Generator[ServerRow]:
    """Yields rows once their conditions have been measured. Raises ServerBenchError, at the end even if only one
    request in a thousand failed, and ValueError for the model."""
    tallies: list[Tally] = []
    with closing(_sites(plan)) as sites:
        for site in sites:
            yield from _rows(plan, site, tallies)
    errors = [error for tally in tallies for error in tally.errors]
    if errors:
        num_requests = sum(tally.num_requests for tally in tallies)
        raise ServerBenchError(f"{len(errors)} of {num_requests} requests failed; the first: {errors[0]}")


def _sites(plan: ServerBenchPlan) -> Generator[BenchSite]:
    """Yields one site at a time: its server has ended when the next one starts."""
    if plan.url is not None:
        yield _their_site(plan, plan.url)
        return
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        checkpoint = served_shape(plan.shape, work) if plan.shape else served_model(plan.model, plan.router, work)
        for dtype in plan.dtypes:
            with _our_site(plan, checkpoint, dtype, work) as site:
                yield site


def _their_site(plan: ServerBenchPlan, url: str) -> BenchSite:
    headers = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    model = wait_until_answering(url, headers)
    return BenchSite(
        target=Target(url, model, plan.api_key),
        facts=Facts(model, None, None, None, commit(), machine()),
        ours=None,
        server_pid=None,
        rng=random.Random(SEED),
        vocab_size=UNKNOWN_VOCAB,
        prompt_tokens=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
    )


@contextmanager
def _our_site(plan: ServerBenchPlan, checkpoint: ServedCheckpoint, dtype: str, work: Path) -> Iterator[BenchSite]:
    sizes = EngineSettings()
    # One more than the number of streams, for a long prompt beside them.
    max_sequences = max(sizes.max_sequences, *plan.concurrency) + 1
    ours = OurEngine.load(
        checkpoint.directory, checkpoint.router, dtype, DTYPES[dtype], max_sequences, sizes.max_step_tokens
    )
    longest = plan.most_prompt_tokens + plan.new_tokens
    if longest > ours.spec.max_context:
        raise ServerBenchError(f"prompt and new tokens make {longest} tokens, the model allows {ours.spec.max_context}")
    # As the server does: garbage collections of a loaded model's objects would count as engine time.
    gc.collect()
    gc.freeze()
    config = work / "config.yaml"
    # Both engines compute alike.
    arithmetic = ours.built.info.arithmetic
    write_config(ours.settings, arithmetic, config)
    arguments = ["--model", str(checkpoint.directory), "--router", checkpoint.router, "--config", str(config)]
    with serving([*arguments, "--device", "cpu", "--dtype", DTYPES[dtype]]) as server:
        settings = ours.settings
        name = plan.shape or plan.model or MODEL_ID
        yield BenchSite(
            target=Target(server.url, wait_until_answering(server.url, {})),
            facts=Facts(name, dtype, settings.max_sequences, settings.max_step_tokens, commit(), machine(), arithmetic),
            ours=ours,
            server_pid=server.pid,
            rng=random.Random(SEED),
            vocab_size=ours.spec.vocab_size,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        )


def _rows(plan: ServerBenchPlan, site: BenchSite, tallies: list[Tally]) -> Iterator[ServerRow]:
    conditions = _conditions(plan, site)
    tallies += [condition.tally for condition in conditions]
    _warm_up(site, max(plan.concurrency), plan.budgets[0])
    with tqdm(total=plan.rounds * len(conditions), desc=f"{plan.rounds} rounds", unit="condition") as progress:
        for _ in range(plan.rounds):
            for condition in conditions:
                condition.run_round()
                progress.update()
    for condition in conditions:
        yield condition.row()
    if plan.memory:
        assert site.ours is not None
        assert site.server_pid is not None
        tallies.append(Tally())
        yield from memory_rows(
            site, site.ours, site.server_pid, plan.memory, max(plan.concurrency), plan.budgets[0], tallies[-1]
        )


def _conditions(plan: ServerBenchPlan, site: BenchSite) -> list[Condition]:
    # The streams beside a long prompt run as long as the context allows, which is unknown if `ours` is None.
    context = plan.prompt_tokens + plan.new_tokens if site.ours is None else site.ours.spec.max_context
    stream_tokens = context - plan.prompt_tokens
    conditions: list[Condition] = []
    for concurrency, budget in product(plan.concurrency, plan.budgets):
        conditions.append(ClosedLoop(site, concurrency, budget, plan.per_stream))
    for rate, budget in product(plan.rates_per_s, plan.budgets):
        conditions.append(PoissonArrivals(site, rate, budget, plan.arrivals))
    if plan.long_prompt:
        for concurrency, budget in product(plan.concurrency, plan.budgets):
            conditions.append(LongPrompt(site, concurrency, budget, plan.long_prompt, stream_tokens))
    if plan.shared_prefix:
        conditions += [SharedPrefix(site, budget, plan.shared_prefix) for budget in plan.budgets]
    return conditions


def _warm_up(site: BenchSite, concurrency: int, budget: float) -> None:
    """Raises ServerBenchError if nothing is answered: better now than after a round of the engine alone."""
    prompts = [site.prompt() for _ in range(concurrency)]
    if site.ours is not None:
        site.ours.answer(prompts, WARM_UP_TOKENS)
    streams = [[site.request(prompt, budget, WARM_UP_TOKENS)] for prompt in prompts]
    exchanges, _ = run_undisturbed(closed_loop(site.target, streams))
    Tally().read(site, exchanges, WARM_UP_TOKENS)
