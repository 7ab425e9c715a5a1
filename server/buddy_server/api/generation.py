"""One admitted completion while the engine works on it."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from buddy_server.api.admission import Admitted
from buddy_server.api.merge import merge
from buddy_server.engine.messages import EngineClient, Event, FinishEvent, TokenEvent
from buddy_server.errors import InternalError, NotReady
from buddy_server.metrics import RequestMetrics

_log = logging.getLogger(__name__)


class Generation:
    """Runs the choices of `admitted`, measures them, and adds up what they used. Iterate `events` once."""

    def __init__(self, engine: EngineClient, admitted: Admitted, measured: RequestMetrics):
        self.admitted = admitted
        self._engine = engine
        self._measured = measured
        self._paths: list[list[tuple[int, ...]]] = [[] for _ in admitted.choices]
        self._finishes: dict[int, FinishEvent] = {}

    async def events(self) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """The events of all choices with the choice's index, those that come at the same time as one list. Closing it
        cancels what still runs.

        Raises InternalError when the engine fails, NotReady when it stops the request by itself.
        """
        streams = [self._engine.submit(choice) for choice in self.admitted.choices]
        async with aclosing(merge(streams)) as merged:
            async for index, events in merged:
                self._take(index, events)
                yield index, events
        assert self.is_complete, "the engine ended a request without a FinishEvent"
        self._measured.cached(self._num_cached)
        self._measured.finish("finished")

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return len(self._finishes) == len(self.admitted.choices)

    @property
    def _answered(self) -> list[FinishEvent]:
        """Nothing where only the prompt was scored: the token that the engine makes all the same is not charged."""
        return [] if self.admitted.body.scores_only else list(self._finishes.values())

    @property
    def _num_cached(self) -> int:
        """Prompt tokens that no choice had to compute."""
        cached = [self._finishes[index].cached_tokens for index in range(len(self.admitted.choices))]
        n = self.admitted.body.n or 1
        return sum(min(cached[first : first + n]) for first in range(0, len(cached), n))

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage: every prompt counts once, the completions of all choices add up."""
        num_prompt = sum(map(len, self.admitted.prompts))
        num_completion = sum(finish.completion_tokens for finish in self._answered)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }

    def buddy(self) -> dict[str, Any]:
        """The `buddy` object of the response, over all choices.

        `layer_tokens` counts the prompt tokens that each choice computed, so nothing for cached ones. With trace,
        `paths` has the layer indices of every token; with several choices it is a list of such lists, one for each
        choice.
        """
        depth = self.admitted.depth
        num_layers = self.admitted.num_layers
        paths = [path for choice in self._paths for path in choice]
        runs = sum(finish.prompt_layer_runs for finish in self._finishes.values())
        runs += sum(finish.output_layer_runs for finish in self._answered)
        buddy: dict[str, Any] = {
            "budget_requested": depth.requested,
            "budget_granted": depth.granted,
            "decided_by": depth.decided_by,
            "layers": num_layers,
            "layers_per_token": sum(map(len, paths)) / len(paths) if paths else 0.0,
            "layer_tokens": runs / num_layers,
            "distinct_paths": len(set(paths)),
        }
        if self.admitted.body.wants_trace:
            buddy["paths"] = self._paths[0] if len(self._paths) == 1 else self._paths
        return buddy

    def _take(self, index: int, events: list[Event]) -> None:
        paths = [event.layers for event in events if isinstance(event, TokenEvent)]
        self._paths[index] += paths
        self._measured.tokens([len(path) for path in paths], index)
        last = events[-1]
        if isinstance(last, FinishEvent):
            self._check(last)
            self._finishes[index] = last

    def _check(self, finish: FinishEvent) -> None:
        if finish.reason == "error":
            # The engine's own words may tell of its inside; they are for the log.
            _log.error(
                "generation failed",
                extra={
                    "request_id": self.admitted.request_id,
                    "tenant": self.admitted.choices[0].tenant,
                    "error": finish.error,
                },
            )
            raise InternalError
        if finish.reason == "cancelled":
            raise NotReady("The engine stopped before it finished this request.")
