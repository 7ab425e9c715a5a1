"""One request inside the engine: its tokens, its progress and its cost."""

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buddy_server.engine.constraint import Constraint
from buddy_server.engine.detokenizer import Detokenizer
from buddy_server.engine.messages import (
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from buddy_server.engine.sampler import Sampler

if TYPE_CHECKING:
    from buddy_kernels import SampledToken


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are prompt and output; the first `num_computed` have their K/V in the cache. `arrival` numbers the
    requests of an engine. `end_token_ids` end the answer.

    For fair sharing (fair_share.py): `arrived_s` and `started_s`, the last time that it got a lane, are by the clock
    there; infinity before. `priority` is the request's, or higher after a long wait. `prepaid` are the
    milli-layers of its prompt that have not run yet, while it has a lane. `turn` numbers the last time that it
    decoded when not all could: the lowest decoded longest ago.

    Tokens are charged once, up to `num_charged`, however often they are recomputed after preemption. `depths` lists
    pairs: a position, and the milli-layers that a token may cost from there on. `scored_prompt` holds the prompt's
    tokens from the second on, if their log probabilities were requested. `lane` is the small integer under which the
    router keeps the running features; -1 while waiting.

    `prefix_keys` are the keys of the prompt's full route blocks, empty without a prefix cache. The first `num_restored`
    of the computed tokens came from it, and `restored_sums` are the running features after them.
    """

    request: GenerationRequest
    arrival: int
    sampler: Sampler
    detokenizer: Detokenizer
    end_token_ids: frozenset[int]
    constraint: Constraint | None = None
    prefix_keys: tuple[bytes, ...] = ()
    tokens: list[int] = field(init=False)
    depths: list[tuple[int, int]] = field(init=False)
    priority: int = field(init=False)
    arrived_s: float = math.inf
    started_s: float = math.inf
    prepaid: int = 0
    turn: int = 0
    num_computed: int = 0
    lane: int = -1
    block_table: list[int] = field(default_factory=list)
    num_restored: int = 0
    restored_sums: "array[float] | None" = None
    num_charged: int = 0
    cached_tokens: int = 0
    prompt_cost: int = 0
    output_cost: int = 0
    scored_prompt: "list[SampledToken]" = field(default_factory=list)
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_tokens)
        self.depths = [(0, self.request.max_cost)]
        self.priority = self.request.priority

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def has_started(self) -> bool:
        """Whether it has ever had a lane."""
        return self.started_s < math.inf

    @property
    def is_raised(self) -> bool:
        return self.priority > self.request.priority

    @property
    def is_decoding(self) -> bool:
        """Whether everything except the newest token, which belongs to the answer, is computed."""
        return self.num_prompt <= self.num_computed == len(self.tokens) - 1

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt, self.cached_tokens, self.num_output, self.prompt_cost, self.output_cost)

    def max_cost(self, position: int) -> int:
        """The milli-layers that the token at `position` may cost."""
        index = bisect_right(self.depths, position, key=lambda depth: depth[0]) - 1
        return self.depths[index][1]

    def change_depth(self, max_cost: int, route_block: int) -> None:
        """Limit tokens that no step has run yet to `max_cost` milli-layers. A route block that has begun keeps its
        path."""
        start = max(self.num_charged, self.num_computed)
        if start < self.num_prompt:
            start = min(-(-start // route_block) * route_block, self.num_prompt)
        self.depths = [depth for depth in self.depths if depth[0] < start] + [(start, max_cost)]
        # The later keys contain the old depth.
        self.prefix_keys = self.prefix_keys[: start // route_block]

    def next_segment(self, route_block: int, start: int) -> int:
        """Length of the segment at `start`: to the end of its route block, or one output token.

        Recomputed output tokens stay segments of one, so that they run the same paths, and the same arithmetic, as the
        first time.
        """
        if start >= self.num_prompt:
            return 1
        block_end = (start // route_block + 1) * route_block
        return min(block_end, self.num_prompt) - start

    def charge(self, start: int, num_tokens: int, cost: int) -> int:
        """Record that `num_tokens` tokens from `start`, all of the prompt or all of the answer, ran at `cost`
        milli-layers each. Returns the milli-layers of those that had not run before."""
        # Tokens never computed for this request came from the prefix cache.
        self.cached_tokens += max(0, start - self.num_charged)
        charged = cost * max(0, start + num_tokens - max(start, self.num_charged))
        if start < self.num_prompt:
            self.prompt_cost += charged
        else:
            self.output_cost += charged
        self.num_computed = start + num_tokens
        self.num_charged = max(self.num_charged, self.num_computed)
        return charged

    def accept(self, token: "SampledToken", path: bytes) -> list[Event]:
        """Append a token made by `path`. Returns its event, and the last one if it ends the request.

        The step has told the constraint already, in a multi-step batch the later tokens too.
        """
        sampling, constraint = self.request.sampling, self.constraint
        if constraint is not None and self.num_output >= constraint.num_accepted:
            return [self.end("grammar", constraint.error)]
        self.tokens.append(token.token_id)
        self.sampler.accept(token.token_id)
        ends = token.token_id in self.end_token_ids
        text = "" if ends else self.detokenizer.add(token.token_id)
        events: list[Event] = [self._token_event(token, text, path)]
        if self.num_output == 1 and sampling.prompt_logprobs is not None:
            events.insert(0, self._prompt_event())
        if ends or self.detokenizer.stopped or (constraint is not None and constraint.ends(self.num_output)):
            events.append(self.end("stop"))
        elif self.num_output >= sampling.max_tokens:
            events.append(self.end("length"))
        return events

    def end(self, reason: FinishReason, error: str | None = None) -> FinishEvent:
        """The last event. The caller removes the sequence from the scheduler."""
        self.has_ended = True
        costs = [max_cost for start, max_cost in self.depths if start < self.num_charged]
        lowest = min(costs, default=self.request.max_cost)
        return FinishEvent(reason, self.usage, self.detokenizer.flush(), error, lowest)

    def _prompt_event(self) -> PromptEvent:
        named = [self._logprobs(token) for token in self.scored_prompt]
        return PromptEvent(tuple(chosen for chosen, _ in named), tuple(likeliest for _, likeliest in named))

    def _token_event(self, token: "SampledToken", text: str, path: bytes) -> TokenEvent:
        if token.logprob is None:
            return TokenEvent(token.token_id, text, path)
        return TokenEvent(token.token_id, text, path, *self._logprobs(token))

    def _logprobs(self, token: "SampledToken") -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
        assert token.logprob is not None
        name = self.detokenizer.name
        likeliest = tuple(TokenLogprob(other, name(other), value) for other, value in token.likeliest)
        return TokenLogprob(token.token_id, name(token.token_id), token.logprob), likeliest
