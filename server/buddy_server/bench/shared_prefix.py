"""The effect of a cached prefix: prompts that begin like an earlier one."""

from dataclasses import dataclass, field
from statistics import median

from buddy_server.bench.http_load import closed_loop, run_undisturbed
from buddy_server.bench.reply import Reply
from buddy_server.bench.server_process import ServerBenchError
from buddy_server.bench.server_row import SharedPrefixRow
from buddy_server.bench.site import BenchSite, Tally

SUFFIX_TOKENS = 16


@dataclass(slots=True)
class SharedPrefix:
    """A prompt, another with the same prefix, then the first again; nothing else runs."""

    site: BenchSite
    budget: float
    prefix_tokens: int
    tally: Tally = field(default_factory=Tally)
    _rounds: list[tuple[Reply, Reply, Reply]] = field(default_factory=list)

    def run_round(self) -> None:
        """Raises ServerBenchError if one of the three requests fails, as there is nothing to compare then."""
        site = self.site
        prefix = site.prompt(self.prefix_tokens)
        first, second = (prefix + site.prompt(SUFFIX_TOKENS) for _ in range(2))
        requests = [site.request(prompt, self.budget) for prompt in (first, second, first)]
        exchanges, _ = run_undisturbed(closed_loop(site.target, [requests]))
        replies = self.tally.read(site, exchanges)
        if len(replies) < len(requests):
            raise ServerBenchError(f"a request with a shared prefix failed: {self.tally.errors[-1]}")
        self._rounds.append((replies[0], replies[1], replies[2]))

    def row(self) -> SharedPrefixRow:
        rounds = self._rounds
        cached = [second.cached_tokens for _, second, _ in rounds if second.cached_tokens is not None]
        return SharedPrefixRow(
            measured="shared prefix",
            facts=self.site.facts,
            budget=self.budget,
            prefix_tokens=self.prefix_tokens,
            prompt_tokens=self.prefix_tokens + SUFFIX_TOKENS,
            new_tokens=self.site.new_tokens,
            num_requests=self.tally.num_requests,
            num_errors=len(self.tally.errors),
            first_ttft_ms=median(first.ttft_s for first, _, _ in rounds) * 1000,
            second_ttft_ms=median(second.ttft_s for _, second, _ in rounds) * 1000,
            repeated_ttft_ms=median(third.ttft_s for _, _, third in rounds) * 1000,
            second_ttft_ratio=median(second.ttft_s / first.ttft_s for first, second, _ in rounds),
            repeated_ttft_ratio=median(third.ttft_s / first.ttft_s for first, _, third in rounds),
            same_text=all(first.text == third.text for first, _, third in rounds),
            cached_tokens=min(cached, default=None),
            rounds=len(rounds),
        )
