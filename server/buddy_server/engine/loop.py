"""The engine's loop: reads commands, steps, reports. The same in a process (worker.py) and, in tests, on a thread."""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from buddy_server.engine.constraint import GrammarError
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import Event, FinishEvent, FinishReason, GenerationRequest, StepStats, Usage
from buddy_server.engine.open_requests import SHUTTING_DOWN, unused
from buddy_server.engine.wire import Cancel, ChargeElsewhere, LimitDepth, LoopCommand, Report, Stop, Submit

log = logging.getLogger(__name__)

MOST_NEW_TOKENS = 4096
"""One turn of the loop adds requests until their prompts reach this many tokens."""
STEP_FAILED = "the engine failed while generating"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request whose grammar is compiled, or cannot be."""

    request: GenerationRequest
    error: str | None = None


class EngineLoop:
    """Commands arrive through `inbox`, from any thread. `deliver` is called on the loop's thread, after every step and
    whenever requests end without one. Every request put before `closed` is set ends exactly once.

    `turn_started_s` is when the loop began to act, by the monotonic clock; None while it waits for a command.
    """

    def __init__(self, engine: Engine, deliver: Callable[[Report], None]) -> None:
        self.inbox: queue.SimpleQueue[LoopCommand | Compiled] = queue.SimpleQueue()
        self.closed = False
        self.turn_started_s: float | None = None
        self._engine = engine
        self._deliver = deliver
        self._open: dict[str, GenerationRequest] = {}
        self._compiler = ThreadPoolExecutor(1, "grammars")
        # Starts the thread, which would otherwise inherit the pinned processor of the loop's.
        self._compiler.submit(int)

    def run(self) -> None:
        """Run until Stop."""
        try:
            while self._handle_commands():
                if self._engine.has_work:
                    self._step()
                else:
                    self._engine.scheduler.check_idle()
                    self._report([])
        finally:
            self.closed = True
            while not self.inbox.empty():
                command = self.inbox.get()
                if isinstance(command, Submit):
                    self._open[command.request.request_id] = command.request
            self._compiler.shutdown(wait=False, cancel_futures=True)
            self._end_all("cancelled", SHUTTING_DOWN)

    def _step(self) -> None:
        try:
            output = self._engine.step()
            self._report(output.events, output.usages, output.stats)
        except torch.AcceleratorError:
            # Nothing works in this process any more. It ends, and is replaced.
            self._end_all("error", STEP_FAILED)
            raise
        except Exception:
            # A bug must not hang any client: every open request gets an answer, and the next request starts clean.
            log.exception("engine step failed")
            self._end_all("error", STEP_FAILED)

    def _handle_commands(self) -> bool:
        """Act on the commands that have arrived; wait for one if there is no work. Returns False to stop."""
        submitted: list[GenerationRequest] = []
        wait, num_tokens = not self._engine.has_work, 0
        self.turn_started_s = None if wait else time.monotonic()
        # Running answers do not wait for a long queue of prompts whose depth is still to be predicted.
        while wait or (num_tokens < MOST_NEW_TOKENS and not self.inbox.empty()):
            command = self.inbox.get()
            if wait:
                wait, self.turn_started_s = False, time.monotonic()
            match command:
                case Submit() if command.request.grammar is not None:
                    self._open[command.request.request_id] = command.request
                    self._compiler.submit(self._compile, command.request)
                case Submit():
                    submitted.append(command.request)
                    num_tokens += len(command.request.prompt_tokens)
                case Compiled() if command.request.request_id not in self._open:
                    pass  # It has been cancelled.
                case Compiled(request, error) if error is not None:
                    self._report([(request.request_id, unused(request, "grammar", error))])
                case Compiled():
                    submitted.append(command.request)
                    num_tokens += len(command.request.prompt_tokens)
                case Cancel():
                    self._add(submitted)
                    submitted = []
                    self._report(self._cancel(command.request_id))
                case LimitDepth():
                    self._engine.limit_depth(command.limits)
                case ChargeElsewhere(served, waiting):
                    self._add(submitted)
                    submitted = []
                    self._engine.scheduler.fair_share.charge_elsewhere(served, waiting)
                case Stop():
                    self._add(submitted)
                    return False
        self._add(submitted)
        return True

    def _compile(self, request: GenerationRequest) -> None:
        """On a thread of its own, since others must not wait: once it is compiled, its request goes on."""
        assert request.grammar is not None
        error = None
        try:
            # Not for a client that has left while others' grammars were compiled.
            if request.request_id in self._open:
                self._engine.grammars.compiled(request.grammar)
        except GrammarError as refused:
            error = str(refused)
        finally:
            # After a bug too: adding the request will fail in the same way, and end it.
            self.inbox.put(Compiled(request, error))

    def _cancel(self, request_id: str) -> list[tuple[str, Event]]:
        """The engine does not know a request yet whose grammar is being compiled."""
        events = self._engine.cancel(request_id)
        if not events and request_id in self._open:
            events = [(request_id, unused(self._open[request_id], "cancelled", None))]
        return events

    def _add(self, requests: list[GenerationRequest]) -> None:
        """Add requests that arrived together in one call, so that the Budget Predictor runs once for all of them."""
        self._open.update((request.request_id, request) for request in requests)
        try:
            events = self._engine.add(*requests)
        except Exception:
            for request in requests:
                self._engine.cancel(request.request_id)
            if len(requests) > 1:
                # Only those that the engine refuses fail.
                for request in requests:
                    self._add([request])
                return
            log.exception("engine refused a request", extra={"request_id": requests[0].request_id})
            events = [(requests[0].request_id, unused(requests[0], "error", STEP_FAILED))]
        if events:
            self._report(events)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        self._report(self._engine.end_all(reason, message))
        # The engine does not know, or no longer knows, requests whose last event was lost in a failed step.
        self._report([(name, unused(request, reason, message)) for name, request in self._open.items()])

    def _report(
        self,
        events: list[tuple[str, Event]],
        usages: list[tuple[str, Usage]] | None = None,
        stats: StepStats | None = None,
    ) -> None:
        scheduler = self._engine.scheduler
        self._deliver(
            Report(
                events,
                usages or [],
                stats,
                num_running=len(scheduler.running),
                kv_usage_ratio=scheduler.pool.usage_ratio,
                queue_s=scheduler.fair_share.queue_s,
                served=scheduler.fair_share.take_served(),
                waiting_tenants=scheduler.fair_share.waiting_tenants,
            )
        )
        for request_id, event in events:
            if isinstance(event, FinishEvent):
                self._open.pop(request_id, None)
