"""What every condition of `buddy bench server` uses: server, engine for comparison, prompts, errors."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from buddy_server.bench.contender import Tokens
from buddy_server.bench.http_load import Exchange, Target
from buddy_server.bench.ours import OurEngine
from buddy_server.bench.reply import Reply, read_reply
from buddy_server.bench.server_process import ServerBenchError
from buddy_server.bench.server_row import Facts, ServerRow


@dataclass(frozen=True, slots=True)
class BenchSite:
    """`ours` and `server_pid` are None for a server that the bench did not start. Prompts repeat only if a condition
    intends it: a cached prefix would make any server look fast."""

    target: Target
    facts: Facts
    ours: OurEngine | None
    server_pid: int | None
    rng: random.Random
    vocab_size: int
    prompt_tokens: int
    new_tokens: int

    def prompt(self, num_tokens: int | None = None) -> Tokens:
        """Random tokens, `prompt_tokens` by default."""
        return tuple(self.rng.choices(range(self.vocab_size), k=num_tokens or self.prompt_tokens))

    def request(self, prompt: Tokens, budget: float, new_tokens: int | None = None) -> bytes:
        return self.target.request(prompt, new_tokens or self.new_tokens, budget)


@dataclass(slots=True)
class Tally:
    """Counts all requests of a condition, and collects their errors."""

    num_requests: int = 0
    errors: list[str] = field(default_factory=list)

    def read(self, site: BenchSite, exchanges: Sequence[Exchange], new_tokens: int | None = None) -> list[Reply]:
        """The answers that match their requests; the others count as errors. Raises ServerBenchError if there are none.

        A model that the bench did not choose may have end tokens, and end an answer early.
        """
        replies = [read_reply(one, new_tokens or site.new_tokens, site.ours is None) for one in exchanges]
        self.num_requests += len(replies)
        self.errors += [reply.error for reply in replies if reply.error is not None]
        good = [reply for reply in replies if reply.error is None]
        if not good:
            raise ServerBenchError(f"not one of {len(replies)} requests was answered: {self.errors[-1]}")
        return good


class Condition(Protocol):
    """Something measured once per round."""

    @property
    def tally(self) -> Tally: ...

    def run_round(self) -> None:
        """Measure once. Raises ServerBenchError."""
        ...

    def row(self) -> ServerRow:
        """The measurements of all rounds."""
        ...


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1000
