"""One admitted job while the engine runs it."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from buddy_routing.action_space import MILLI_LAYERS
from buddy_server.api.admission import Admitted
from buddy_server.api.fold import Delta, Fold, total
from buddy_server.api.merge import merge
from buddy_server.engine.messages import (
    AnswerEvent,
    DepthEvent,
    EngineClient,
    Event,
    FinishEvent,
    GenerationRequest,
    StartEvent,
    TokenEvent,
    Usage,
)
from buddy_server.errors import InternalError, InvalidRequest, NotReady, Outcome
from buddy_server.tenancy.depth import lowered_depth, predicted_depth
from buddy_server.tenancy.request_life import RequestLife

_log = logging.getLogger(__name__)


class Generation:
    """Runs the choices of `admitted`, measures them, and sums their usage. Run it only once, by `deltas` or
    `answers`."""

    def __init__(self, engine: EngineClient, admitted: Admitted, life: RequestLife):
        self.admitted = admitted
        self.metrics = life.metrics
        self._life = life
        self._engine = engine
        self._depth = admitted.depth
        self._limits = [choice.max_cost for choice in admitted.choices]
        self._predicted: list[int] = []
        self._lowered: list[int] = []
        self._paths: list[list[bytes]] = [[] for _ in admitted.choices]
        self._finishes: dict[int, FinishEvent] = {}
        self._folds = [Fold(admitted.new_parser(), admitted.job.scores_only) for _ in admitted.choices]

    async def answers(self) -> list[Delta]:
        """The whole answer of every choice. Raises what `deltas` raises."""
        parts: list[list[Delta]] = [[] for _ in self.admitted.choices]
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                parts[index].append(delta)
        return [total(of_choice) for of_choice in parts]

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all choices, each with its choice's index. Closing the iterator cancels what still runs.

        Raises InternalError if the engine fails, NotReady if the engine stops the request.
        """
        streams = [self._answer(choice) for choice in self.admitted.choices]
        async with aclosing(merge(streams)) as merged:
            async for index, events in merged:
                if answer := self._take(index, events):
                    yield index, self._folds[index].add(answer)
        assert self.is_complete, "the engine ended a request without a FinishEvent"
        await self._life.bill.settled()
        self.metrics.cached(self.usage().cached_tokens)
        self.metrics.finish("finished")

    async def fail(self, outcome: Outcome) -> None:
        """The response ends with an error. Returns when limits and journal know what was used until then."""
        self.metrics.finish(outcome)
        self._life.bill.close(outcome)
        await self._life.bill.settled()

    async def _answer(self, choice: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        self._life.bill.submitted(choice.request_id)
        async with aclosing(self._engine.submit(choice)) as events:
            async for together in events:
                yield together

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return len(self._finishes) == len(self.admitted.choices)

    def call_id(self, index: int, call: int) -> str:
        """The id of a tool call of choice `index`."""
        return f"call_{self.admitted.id.removeprefix(self.admitted.job.id_prefix)}{index}{call}"

    def usage(self) -> Usage:
        """Every prompt counts once, with the tokens that no choice had to compute as cached; the completions of all
        choices add up. If only the prompt was scored, the token that the engine generates anyway does not count."""
        usages = [self._finishes[index].usage for index in range(len(self.admitted.choices))]
        n = self.admitted.job.n
        cached = [min(usage.cached_tokens for usage in usages[first : first + n]) for first in range(0, len(usages), n)]
        answered = [] if self.admitted.job.scores_only else usages
        return Usage(
            prompt_tokens=sum(map(len, self.admitted.prompts)),
            cached_tokens=sum(cached),
            completion_tokens=sum(usage.completion_tokens for usage in answered),
            prompt_cost=sum(usage.prompt_cost for usage in usages),
            output_cost=sum(usage.output_cost for usage in usages),
        )

    def buddy(self) -> dict[str, Any]:
        """The `buddy` object of the response, over all choices.

        `layer_tokens` is what the request is charged: every token computed for it, at the layers it ran. Cached tokens
        and the last token of an answer cost nothing. With trace, `paths` lists the layer indices that made each token;
        with several choices it is a list of such lists, one per choice.
        """
        actions, depth = self.admitted.actions, self._depth
        if self._lowered:
            # With several choices, the lowest counts.
            depth = lowered_depth(depth, min(self._lowered), actions)
        paths = [path for choice in self._paths for path in choice]
        layers = sum(actions.path_costs[path] for path in paths) / MILLI_LAYERS
        buddy: dict[str, Any] = {
            "budget_requested": depth.requested,
            "budget_granted": depth.granted,
            "decided_by": depth.decided_by,
            "layers": actions.num_layers,
            "layers_per_token": layers / len(paths) if paths else 0.0,
            "layer_tokens": round(self.usage().cost / actions.full_cost, 3),
            "distinct_paths": len(set(paths)),
        }
        if self.admitted.job.trace:
            traces = [[actions.layers_run(path) for path in choice] for choice in self._paths]
            buddy["paths"] = traces[0] if len(traces) == 1 else traces
        return buddy

    def _take(self, index: int, events: list[Event]) -> list[AnswerEvent]:
        """Record `events`; returns those that are part of the answer."""
        answer: list[AnswerEvent] = []
        for event in events:
            match event:
                case DepthEvent():
                    self._settle_depth(index, event.max_cost)
                case StartEvent():
                    self.metrics.queued(event.queue_s)
                case _:
                    answer.append(event)
        paths = [event.path for event in answer if isinstance(event, TokenEvent)]
        self._paths[index] += paths
        costs = self.admitted.actions.path_costs
        self.metrics.tokens([costs[path] for path in paths], index)
        if answer and isinstance(last := answer[-1], FinishEvent):
            self._life.answered()
            self._check(last)
            self._finishes[index] = last
            if last.max_cost < self._limits[index]:
                self._lowered.append(last.max_cost)
        return answer

    def _settle_depth(self, index: int, max_cost: int) -> None:
        """Record one choice's predicted depth. With several prompts, the deepest counts as the request's."""
        self._limits[index] = max_cost
        self._life.bill.predicted(self.admitted.choices[index].request_id, max_cost)
        self._predicted.append(max_cost)
        self._depth = predicted_depth(self.admitted.depth, max(self._predicted), self.admitted.actions)
        if len(self._predicted) == len(self.admitted.choices):
            self.metrics.granted(self._depth.granted)

    def _check(self, finish: FinishEvent) -> None:
        if finish.reason == "error":
            # The engine's message may reveal internals, so it goes only to the log.
            _log.error(
                "generation failed",
                extra={
                    "request_id": self.admitted.request_id,
                    "tenant": self.admitted.choices[0].tenant,
                    "error": finish.error,
                },
            )
            raise InternalError
        if finish.reason == "grammar":
            raise InvalidRequest(f"The answer could not be kept within its grammar or schema: {finish.error}")
        if finish.reason == "lost":
            # Not the queue's doing, whatever the status says.
            self.metrics.finish("error")
        if finish.reason in ("cancelled", "lost"):
            raise NotReady(
                "The engine stopped before it finished this request.",
                retry_after_s=self._engine.ready_in_s,
            )
