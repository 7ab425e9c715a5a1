"""The engine: requests in, steps, events out. Single-threaded; loop.py drives it."""

import time
from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from buddy_server.engine.detokenizer import Detokenizer
from buddy_server.engine.messages import (
    DepthCount,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    StepStats,
    TokenEvent,
    TokenLogprob,
)
from buddy_server.engine.runner import ModelRunner, StepResult
from buddy_server.engine.sampler import Sampler
from buddy_server.engine.scheduler import Scheduler
from buddy_server.engine.sequence import SampledToken, Sequence, Work


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Events by request id, in order, and the step's figures."""

    events: list[tuple[str, Event]]
    stats: StepStats


@dataclass(slots=True)
class Engine:
    """`end_token_ids` end every request. After an event of `FinishEvent` nothing more comes for that request."""

    scheduler: Scheduler
    runner: ModelRunner
    tokenizer: Tokenizer
    end_token_ids: frozenset[int]
    _sequences: dict[str, Sequence] = field(default_factory=dict)
    _samplers: dict[Sequence, Sampler] = field(default_factory=dict)
    _detokenizers: dict[Sequence, Detokenizer] = field(default_factory=dict)

    def add(self, request: GenerationRequest) -> None:
        # Made first: should one raise, the scheduler has not heard of the request.
        sampler, detokenizer = Sampler(request.sampling), Detokenizer(self.tokenizer, request.sampling.stop)
        sequence = self.scheduler.add(request)
        self._sequences[request.request_id] = sequence
        self._samplers[sequence] = sampler
        self._detokenizers[sequence] = detokenizer

    def cancel(self, request_id: str) -> None:
        """Forget a request at any point; unknown ids have ended already."""
        if request_id in self._sequences:
            self._end(self._sequences[request_id], "cancelled")

    def end_all(self, reason: FinishReason, message: str) -> list[tuple[str, Event]]:
        """End every request, after a step that raised or because the engine stops."""
        sequences = list(self._sequences.values())
        return [(s.request.request_id, self._end(s, reason, error=message)) for s in sequences]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> StepOutput:
        works = self.scheduler.schedule()
        most_steps = self.scheduler.reserve_steps(works)
        started = time.perf_counter()
        results = self.runner.run(works, self._samplers, most_steps, self.end_token_ids)
        self.scheduler.pace.observe(works, len(results), time.perf_counter() - started)
        num_sequences = len({work.sequence.request.request_id for work in works})
        depth = self._depth(works, results)
        events = [event for result in results for event in self._commit(works, result)]
        if most_steps > 1:
            self.scheduler.give_back(works)
        stats = StepStats(
            num_steps=len(results),
            num_rows=len(results) * sum(work.length for work in works),
            num_sequences=num_sequences,
            num_layers_read=sum(result.num_layers_read for result in results),
            num_preemptions=self.scheduler.take_preemptions(),
            router_s=sum(result.router_s for result in results),
            depth=depth,
        )
        return StepOutput(events, stats)

    def _depth(self, works: list[Work], results: list[StepResult]) -> dict[str, DepthCount]:
        num_layers = self.runner.num_layers
        executed: dict[str, int] = defaultdict(int)
        routed: dict[str, int] = defaultdict(int)
        for result in results:
            for work, layers in zip(works, result.layers, strict=True):
                executed[work.sequence.request.tenant] += work.length * len(layers)
                routed[work.sequence.request.tenant] += work.length
        return {tenant: DepthCount(count, routed[tenant] * num_layers - count) for tenant, count in executed.items()}

    def _commit(self, works: list[Work], result: StepResult) -> list[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        done = zip(works, result.layers, result.scored, result.tokens, strict=True)
        for index, (work, layers, scored, token) in enumerate(done):
            sequence = work.sequence
            if sequence not in self._samplers:
                continue  # ended in an earlier one of several steps
            # What nobody has computed for this request came from the prefix cache.
            sequence.num_cached += max(0, work.start - sequence.num_charged)
            sequence.scored_prompt += scored
            sequence.prompt_layer_runs += work.num_new_prompt * len(layers)
            sequence.num_computed += work.length
            sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
            if self.scheduler.is_cacheable(work):
                self.scheduler.cache(work, array("d", result.sums[index].tolist()))
            if token is not None:
                request_id = sequence.request.request_id
                events += [(request_id, event) for event in self._accept(sequence, token, layers)]
        return events

    def _accept(self, sequence: Sequence, token: SampledToken, layers: tuple[int, ...]) -> list[Event]:
        """Append a token; its event, and the last one if it ends the request."""
        sampling = sequence.request.sampling
        detokenizer = self._detokenizers[sequence]
        sequence.tokens.append(token.token_id)
        sequence.output_layer_runs += len(layers)
        ended = token.token_id in self.end_token_ids or token.token_id in sampling.stop_token_ids
        text = "" if ended else detokenizer.add(token.token_id)
        events: list[Event] = [self._token_event(token, text, layers)]
        if sequence.num_output == 1 and sampling.prompt_logprobs is not None:
            events.insert(0, self._prompt_event(sequence))
        if ended or detokenizer.stopped:
            events.append(self._end(sequence, "stop"))
        elif sequence.num_output >= sampling.max_tokens:
            events.append(self._end(sequence, "length"))
        return events

    def _prompt_event(self, sequence: Sequence) -> PromptEvent:
        named = [self._logprobs(token) for token in sequence.scored_prompt]
        return PromptEvent(tuple(chosen for chosen, _ in named), tuple(likeliest for _, likeliest in named))

    def _token_event(self, token: SampledToken, text: str, layers: tuple[int, ...]) -> TokenEvent:
        if token.logprob is None:
            return TokenEvent(token.token_id, text, layers)
        return TokenEvent(token.token_id, text, layers, *self._logprobs(token))

    def _logprobs(self, token: SampledToken) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
        assert token.logprob is not None
        name = self._token_text
        likeliest = tuple(TokenLogprob(other, name(other), value) for other, value in token.likeliest)
        return TokenLogprob(token.token_id, name(token.token_id), token.logprob), likeliest

    def _token_text(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> FinishEvent:
        """Take everything back; the one place where a request ends."""
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request.request_id], self._samplers[sequence]
        detokenizer = self._detokenizers.pop(sequence)
        return FinishEvent(
            reason=reason,
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_output,
            prompt_layer_runs=sequence.prompt_layer_runs,
            output_layer_runs=sequence.output_layer_runs,
            cached_tokens=sequence.num_cached,
            text=detokenizer.flush(),
            error=error,
        )
