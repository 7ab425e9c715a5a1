"""The effect of a long prompt on clients that are already reading their answers."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from statistics import median

from buddy_server.bench.http_load import Exchange, Target, run_undisturbed
from buddy_server.bench.reply import Reply
from buddy_server.bench.server_process import ServerBenchError
from buddy_server.bench.server_row import LongPromptRow
from buddy_server.bench.site import BenchSite, Tally, percentile_ms

CALM_READS = 8
"""How many reads every stream gets before the long prompt is sent."""
POLL_S = 0.002
MOST_STREAM_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _Gaps:
    """The gaps of one round: before the long prompt, and during its prefill."""

    calm_s: list[float]
    disturbed_s: list[float]
    long_ttft_s: float

    @property
    def ratio(self) -> float:
        return percentile_ms(self.disturbed_s, 99) / percentile_ms(self.calm_s, 50)


@dataclass(slots=True)
class LongPrompt:
    """`long_prompt_tokens` arrive while `concurrency` streams decode, each up to `stream_tokens` tokens; the bench ends
    the streams once it has measured enough."""

    site: BenchSite
    concurrency: int
    budget: float
    long_prompt_tokens: int
    stream_tokens: int
    tally: Tally = field(default_factory=Tally)
    _rounds: list[_Gaps] = field(default_factory=list)

    def run_round(self) -> None:
        """Raises ServerBenchError if a stream ends before the long prompt has been prefilled."""
        site = self.site
        num_tokens = min(self.stream_tokens, MOST_STREAM_TOKENS)
        streams = [Exchange(site.request(site.prompt(), self.budget, num_tokens)) for _ in range(self.concurrency)]
        # One token only: the answer ends with the prefill.
        late = Exchange(site.request(site.prompt(self.long_prompt_tokens), self.budget, 1))
        run_undisturbed(_disturb(site.target, streams, late))
        replies = self.tally.read(site, streams, num_tokens)
        (long_reply,) = self.tally.read(site, [late], 1)
        self._rounds.append(_gaps(replies, long_reply))

    def row(self) -> LongPromptRow:
        rounds = self._rounds
        return LongPromptRow(
            measured="long prompt",
            facts=self.site.facts,
            concurrency=self.concurrency,
            budget=self.budget,
            prompt_tokens=self.site.prompt_tokens,
            long_prompt_tokens=self.long_prompt_tokens,
            num_requests=self.tally.num_requests,
            num_errors=len(self.tally.errors),
            long_ttft_p50_ms=median(one.long_ttft_s for one in rounds) * 1000,
            calm_itl_p50_ms=percentile_ms(list(chain.from_iterable(one.calm_s for one in rounds)), 50),
            itl_p99_ms=percentile_ms(list(chain.from_iterable(one.disturbed_s for one in rounds)), 99),
            itl_p99_over_median=median(one.ratio for one in rounds),
            rounds=len(rounds),
        )


async def _disturb(target: Target, streams: Sequence[Exchange], late: Exchange) -> None:
    """Raises ServerBenchError if a stream ends before `late`."""
    tasks = [asyncio.create_task(stream.run(target)) for stream in streams]
    try:
        await _until(lambda: all(len(stream.reads) >= CALM_READS for stream in streams), tasks, streams)
        await late.run(target)
        seen = [len(stream.reads) for stream in streams]
        # The gap in which the prefill ended is the longest, so it must be read to its end.
        await _until(lambda: all(len(s.reads) > n for s, n in zip(streams, seen, strict=True)), tasks, streams)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def _until(
    happened: Callable[[], bool], tasks: Sequence["asyncio.Task[None]"], streams: Sequence[Exchange]
) -> None:
    while not happened():
        for task, stream in zip(tasks, streams, strict=True):
            if task.done():
                why = stream.failure or "it needs more tokens"
                raise ServerBenchError(f"a stream ended before the long prompt's prefill did: {why}")
        await asyncio.sleep(POLL_S)


def _gaps(streams: Sequence[Reply], late: Reply) -> _Gaps:
    all_decode_s = max(stream.arrival_times_s[0] for stream in streams)
    prefilled_s = late.arrival_times_s[0]
    gaps = [gap for stream in streams for gap in pairwise(stream.arrival_times_s)]
    return _Gaps(
        calm_s=[after - before for before, after in gaps if before >= all_decode_s and after <= late.sent_s],
        disturbed_s=[after - before for before, after in gaps if before < prefilled_s and after > late.sent_s],
        long_ttft_s=late.ttft_s,
    )
