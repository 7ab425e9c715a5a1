"""One request inside the engine, and the units of work it is cut into."""

from array import array
from dataclasses import dataclass, field

from buddy_server.engine.messages import GenerationRequest


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `likeliest` (token, log probability) only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are prompt and output; the first `num_computed` have their K/V in the cache.

    Prompt tokens are charged once, up to `num_charged`, however often preemption makes the engine compute them.
    `scored_prompt` holds the prompt's tokens from the second on, as far as log probabilities of them were asked for.
    `lane` is the small integer under which the router keeps the running features; -1 while waiting.

    `prefix_keys` name the full blocks of the prompt, none where there is no prefix cache. The first `num_restored` of
    the computed tokens were taken from it, and `restored_sums` are the running features after them. `num_cached` prompt
    tokens were never computed for this request; they are not charged.
    """

    request: GenerationRequest
    tokens: list[int]
    prefix_keys: tuple[bytes, ...] = ()
    num_computed: int = 0
    lane: int = -1
    block_table: list[int] = field(default_factory=list)
    num_restored: int = 0
    restored_sums: "array[float] | None" = None
    num_charged: int = 0
    num_cached: int = 0
    prompt_layer_runs: int = 0
    output_layer_runs: int = 0
    scored_prompt: list[SampledToken] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token, one of the answer, is computed."""
        return self.num_prompt <= self.num_computed == len(self.tokens) - 1

    def next_segment(self, route_block: int, start: int) -> int:
        """Length of the segment at `start`: to the end of its prefill block, or one output token.

        Recomputed output tokens stay segments of one, so that they run the paths, and the arithmetic, of the
        first time.
        """
        if start >= self.num_prompt:
            return 1
        block_end = (start // route_block + 1) * route_block
        return min(block_end, self.num_prompt) - start


@dataclass(frozen=True, slots=True)
class Work:
    """Rows `start` .. `start + length - 1` of a sequence: one segment of one step.

    A prefill block may run in pieces: the first looks `ahead` to the rest of it, from which its path follows, and the
    others, `continues`, take that path too.
    """

    sequence: Sequence
    start: int
    length: int
    ahead: int = 0
    continues: bool = False

    @property
    def num_new_prompt(self) -> int:
        """Prompt rows here that were never computed before."""
        end = min(self.start + self.length, self.sequence.num_prompt)
        return max(0, end - max(self.start, self.sequence.num_charged))

    @property
    def scored(self) -> range:
        """Positions here whose successor is a prompt token with a log probability to be told, the first time only."""
        if self.sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(self.sequence.scored_prompt))
        return range(first, min(self.start + self.length, self.sequence.num_prompt - 1))

    @property
    def makes_token(self) -> bool:
        return self.start + self.length == len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        """Whether it is the newest token of an answer; not so of a prompt, nor of an answer that is computed again."""
        return self.makes_token and self.start >= self.sequence.num_prompt
