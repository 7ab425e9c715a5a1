"""Benchmarks with many requests: a closed loop of streams, and Poisson arrivals."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from statistics import median

from buddy_server.bench.contender import Timing, Tokens
from buddy_server.bench.http_load import closed_loop, open_loop, run_undisturbed
from buddy_server.bench.reply import Reply
from buddy_server.bench.server_row import LoadRow
from buddy_server.bench.site import BenchSite, Tally, percentile_ms


@dataclass(frozen=True, slots=True)
class _Round:
    """`timings` are the engine's, one per batch; empty without an engine."""

    replies: list[Reply]
    client_cpu_s: float
    timings: list[Timing]

    @property
    def span_s(self) -> float:
        return max(reply.ended_s for reply in self.replies) - min(reply.sent_s for reply in self.replies)

    @property
    def tokens_per_s(self) -> float:
        return sum(reply.num_tokens for reply in self.replies) / self.span_s

    @property
    def ttft_s(self) -> float:
        return median(reply.ttft_s for reply in self.replies)

    @property
    def prefill_s(self) -> float:
        return median(timing.prefill_s for timing in self.timings)

    def engine_tokens_per_s(self, batch: int, new_tokens: int) -> float:
        return len(self.timings) * batch * new_tokens / sum(t.prefill_s + t.decode_s for t in self.timings)


@dataclass(slots=True)
class ClosedLoop:
    """`concurrency` streams that each send `per_stream` requests, one after another. Before them, the engine alone runs
    the same prompts, `concurrency` at a time."""

    site: BenchSite
    concurrency: int
    budget: float
    per_stream: int
    tally: Tally = field(default_factory=Tally)
    _rounds: list[_Round] = field(default_factory=list)

    def run_round(self) -> None:
        site = self.site
        batches = [[site.prompt() for _ in range(self.concurrency)] for _ in range(self.per_stream)]
        timings = self._engine_alone(batches)
        streams = [[site.request(prompt, self.budget) for prompt in stream] for stream in zip(*batches, strict=True)]
        exchanges, cpu_s = run_undisturbed(closed_loop(site.target, streams))
        self._rounds.append(_Round(self.tally.read(site, exchanges), cpu_s, timings))

    def _engine_alone(self, batches: Sequence[list[Tokens]]) -> list[Timing]:
        if self.site.ours is None:
            return []
        ours = replace(self.site.ours, budgets=(self.budget,))
        return [ours.answer(batch, self.site.new_tokens) for batch in batches]

    def row(self) -> LoadRow:
        row = replace(
            _load_row("closed loop", self.site, self.budget, self._rounds, self.tally), concurrency=self.concurrency
        )
        if self.site.ours is None:
            return row
        engine = [one.engine_tokens_per_s(self.concurrency, self.site.new_tokens) for one in self._rounds]
        over = [one.ttft_s - one.prefill_s for one in self._rounds]
        return replace(
            row,
            engine_tokens_per_s=median(engine),
            share_of_engine=median(one.tokens_per_s / alone for one, alone in zip(self._rounds, engine, strict=True)),
            engine_prefill_ms=median(one.prefill_s for one in self._rounds) * 1000,
            ttft_over_prefill_ms=median(over) * 1000 if self.concurrency == 1 else None,
        )


@dataclass(slots=True)
class PoissonArrivals:
    """`arrivals` requests per round, sent at random times, `rate_per_s` on average, whether or not earlier ones have
    finished."""

    site: BenchSite
    rate_per_s: float
    budget: float
    arrivals: int
    tally: Tally = field(default_factory=Tally)
    _rounds: list[_Round] = field(default_factory=list)

    def run_round(self) -> None:
        site = self.site
        arrivals_s = list(accumulate(site.rng.expovariate(self.rate_per_s) for _ in range(self.arrivals)))
        requests = [site.request(site.prompt(), self.budget) for _ in arrivals_s]
        exchanges, cpu_s = run_undisturbed(open_loop(site.target, requests, arrivals_s))
        self._rounds.append(_Round(self.tally.read(site, exchanges), cpu_s, []))

    def row(self) -> LoadRow:
        return replace(
            _load_row("poisson", self.site, self.budget, self._rounds, self.tally), rate_per_s=self.rate_per_s
        )


def _load_row(measured: str, site: BenchSite, budget: float, rounds: Sequence[_Round], tally: Tally) -> LoadRow:
    replies = list(chain.from_iterable(one.replies for one in rounds))
    ttfts, spans = [reply.ttft_s for reply in replies], [reply.duration_s for reply in replies]
    gaps = list(chain.from_iterable(reply.gaps_s for reply in replies))
    num_tokens = sum(reply.num_tokens for reply in replies)
    return LoadRow(
        measured=measured,
        facts=site.facts,
        concurrency=None,
        rate_per_s=None,
        budget=budget,
        prompt_tokens=site.prompt_tokens,
        new_tokens=site.new_tokens,
        num_requests=tally.num_requests,
        num_errors=len(tally.errors),
        output_tokens_per_s=median(one.tokens_per_s for one in rounds),
        requests_per_s=median(len(one.replies) / one.span_s for one in rounds),
        ttft_p50_ms=percentile_ms(ttfts, 50),
        ttft_p95_ms=percentile_ms(ttfts, 95),
        ttft_p99_ms=percentile_ms(ttfts, 99),
        itl_p50_ms=percentile_ms(gaps, 50) if gaps else None,
        itl_p95_ms=percentile_ms(gaps, 95) if gaps else None,
        itl_p99_ms=percentile_ms(gaps, 99) if gaps else None,
        e2e_p50_ms=percentile_ms(spans, 50),
        e2e_p95_ms=percentile_ms(spans, 95),
        e2e_p99_ms=percentile_ms(spans, 99),
        tokens_per_arrival=num_tokens / sum(len(reply.arrival_times_s) for reply in replies),
        client_cpu_us_per_token=sum(one.client_cpu_s for one in rounds) / num_tokens * 1e6,
        engine_tokens_per_s=None,
        share_of_engine=None,
        engine_prefill_ms=None,
        ttft_over_prefill_ms=None,
        rounds=len(rounds),
    )
