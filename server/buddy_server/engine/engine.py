"""The engine: accepts requests, runs steps, returns events. Single-threaded; loop.py calls it."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from buddy_server.engine.batch import Batch
from buddy_server.engine.constraint import Grammars
from buddy_server.engine.depth_predictor import DepthPredictor
from buddy_server.engine.detokenizer import Detokenizer
from buddy_server.engine.messages import DepthEvent, Event, FinishEvent, FinishReason, GenerationRequest
from buddy_server.engine.runner import ModelRunner, RunningBatch
from buddy_server.engine.sampler import Sampler
from buddy_server.engine.scheduler import Scheduler, StepOutput
from buddy_server.engine.sequence import Sequence

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Engine:
    """A request ends at one of `end_token_ids`, if nothing ended it before. Its last event is a FinishEvent."""

    scheduler: Scheduler
    runner: ModelRunner
    tokenizer: Tokenizer
    end_token_ids: frozenset[int]
    grammars: Grammars
    depth_predictor: DepthPredictor | None = None
    _sequences: dict[str, Sequence] = field(default_factory=dict)
    _arrivals: Iterator[int] = field(default_factory=itertools.count)
    _limits: Mapping[str, int] = field(default_factory=dict)
    _has_new_limits: bool = False
    _running: RunningBatch | None = None

    def add(self, *requests: GenerationRequest) -> list[tuple[str, Event]]:
        """Accept requests. Returns a DepthEvent for each request whose depth the Budget Predictor chose.

        Raises GrammarError. A grammar that is not compiled yet (`grammars.compiled`) may take a second.
        """
        depths = self._predicted_depths(requests)
        for request in requests:
            params = request.sampling
            sequence = Sequence(
                replace(request, max_cost=depths.get(request.request_id, request.max_cost)),
                next(self._arrivals),
                Sampler(params),
                Detokenizer(self.tokenizer, params.stop, request.shown_tokens),
                frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_token_ids),
                None if request.grammar is None else self.grammars.constraint(request.grammar),
            )
            self._limit(sequence)
            self.scheduler.add(sequence)
            self._sequences[request.request_id] = sequence
        return [(request_id, DepthEvent(max_cost)) for request_id, max_cost in depths.items()]

    def _predicted_depths(self, requests: tuple[GenerationRequest, ...]) -> dict[str, int]:
        """The `max_cost` predicted for each request that has a `min_cost`, by request id. Empty without a predictor, or
        if it fails: these requests keep their own `max_cost`."""
        open_requests = [request for request in requests if request.min_cost is not None]
        if self.depth_predictor is None or not open_requests:
            return {}
        bounds = [(request.min_cost or 0, request.max_cost) for request in open_requests]
        try:
            costs = self.depth_predictor.costs([request.prompt_tokens for request in open_requests], bounds)
        except Exception:
            # A failing predictor must not fail the requests.
            log.exception("predicting depths failed")
            return {}
        return {request.request_id: cost for request, cost in zip(open_requests, costs, strict=True)}

    def limit_depth(self, limits: Mapping[str, int]) -> None:
        """As in EngineProcess: for the requests here, from the next batch on, and those to come."""
        self._limits, self._has_new_limits = limits, True

    def _limit(self, sequence: Sequence) -> None:
        """Run the rest of a sequence under its own limit and its tier's, whichever is lower."""
        request, smallest = sequence.request, self.scheduler.actions.smallest_cost
        limit = request.max_cost if request.tier is None else self._limits.get(request.tier, request.max_cost)
        max_cost = min(request.max_cost, max(limit, smallest))
        if max_cost != sequence.depths[-1][1]:
            self.scheduler.change_depth(sequence, max_cost)

    def cancel(self, request_id: str) -> list[tuple[str, Event]]:
        """End a request, whether it waits or runs. Returns no events if it has already ended."""
        known = [self._sequences[request_id]] if request_id in self._sequences else []
        return self._end(known, "cancelled")

    def end_all(self, reason: FinishReason, message: str) -> list[tuple[str, Event]]:
        """End every request, because a step raised an exception or the engine stops."""
        self._running = None
        return self._end(list(self._sequences.values()), reason, message)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._running is not None

    def step(self) -> StepOutput:
        running = self._running or self.runner.launch(self._schedule())
        following = self._following(running)
        # While the device computes it, the batch before is read.
        self._running = None if following is None else self.runner.launch_after(running, following)
        result = self.runner.collect(running)
        output = self.scheduler.commit(running.batch, result, is_followed=following is not None)
        for request_id, event in output.events:
            if isinstance(event, FinishEvent):
                del self._sequences[request_id]
        return output

    def _schedule(self) -> Batch:
        if self._has_new_limits:
            self._has_new_limits = False
            for sequence in self._sequences.values():
                self._limit(sequence)
        return self.scheduler.schedule()

    def _following(self, running: RunningBatch) -> Batch | None:
        if self._has_new_limits or running.call.launch_next is None:
            return None
        return self.scheduler.following(running.batch, running.call.num_steps)

    def _end(
        self, sequences: list[Sequence], reason: FinishReason, error: str | None = None
    ) -> list[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        for sequence in sequences:
            self.scheduler.finish(sequence)
            del self._sequences[sequence.request.request_id]
            events.append((sequence.request.request_id, sequence.end(reason, error)))
        return events
