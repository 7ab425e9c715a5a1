"""Whether a server's memory grows over thousands of requests."""

from collections.abc import Iterator

from tqdm import tqdm

from buddy_server.bench.http_load import closed_loop, run_undisturbed
from buddy_server.bench.ours import OurEngine
from buddy_server.bench.resident import resident_mib
from buddy_server.bench.server_row import MemoryRow
from buddy_server.bench.site import BenchSite, Tally

SHORT_PROMPT_TOKENS = 16
SHORT_NEW_TOKENS = 8
SAMPLE_REQUESTS = 500
"""How many requests lie between two measurements."""
MIB = 2**20


def memory_rows(
    site: BenchSite, ours: OurEngine, server_pid: int, num_requests: int, concurrency: int, budget: float, tally: Tally
) -> Iterator[MemoryRow]:
    """One row before the first of `num_requests`, one after every 500, one at the end. Raises ServerBenchError."""
    peak = 0.0
    done = 0
    with tqdm(total=num_requests, desc="memory", unit="request") as progress:
        while True:
            now = resident_mib(server_pid)
            peak = max(peak, now)
            yield MemoryRow(
                measured="memory",
                facts=site.facts,
                concurrency=concurrency,
                budget=budget,
                prompt_tokens=SHORT_PROMPT_TOKENS,
                new_tokens=SHORT_NEW_TOKENS,
                num_requests=done,
                num_errors=len(tally.errors),
                resident_mib=now,
                peak_resident_mib=peak,
                weights_mib=ours.weight_bytes / MIB,
                kv_cache_mib=ours.kv_cache_bytes / MIB,
            )
            if done == num_requests:
                return
            count = min(SAMPLE_REQUESTS, num_requests - done)
            _answer(site, count, concurrency, budget, tally)
            done += count
            progress.update(count)


def _answer(site: BenchSite, count: int, concurrency: int, budget: float, tally: Tally) -> None:
    requests = [site.request(site.prompt(SHORT_PROMPT_TOKENS), budget, SHORT_NEW_TOKENS) for _ in range(count)]
    streams = [requests[start::concurrency] for start in range(concurrency)]
    exchanges, _ = run_undisturbed(closed_loop(site.target, streams))
    tally.read(site, exchanges, SHORT_NEW_TOKENS)
