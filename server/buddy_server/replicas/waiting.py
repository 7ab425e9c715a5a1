"""The requests of one replica that wait for their first token, as the autoscaler hears of them (scaling.py).

Costs are in milli-layers. Times are seconds of one clock, which the caller reads.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from buddy_server.engine.messages import Event, GenerationRequest, StartEvent, StepStats, TokenEvent

WINDOW_S = 5.0
"""How long a wait counts that is over: reports come every few seconds, and short waits in between count too."""


@dataclass(slots=True)
class _Waiting:
    """`ran_before` is what the replica had run when the request came. `left_cost` is what may have to run until it has
    its first token, or, before its first step, until its end."""

    came_s: float
    ran_before: int
    prompt_cost: int
    left_cost: int
    has_started: bool = False


class WaitingRequests:
    """From its arrival to its first token, a request is late by the time that others took from it: all of the time to
    its first step, and afterwards that part in which the replica ran more than the request's own prompt. A token
    through the whole model costs `full_cost`."""

    def __init__(self, full_cost: int) -> None:
        self._full_cost = full_cost
        self._waiting: dict[str, _Waiting] = {}
        self._past: deque[tuple[float, float]] = deque()
        """When waits ended, and how late the requests were."""
        self._ran = self._ran_reported = 0
        self._reported_s: float | None = None

    def add(self, request: GenerationRequest, now_s: float) -> None:
        num_prompt = len(request.prompt_tokens)
        prompt_cost = num_prompt * request.max_cost
        cost = (num_prompt + request.sampling.max_tokens) * request.max_cost
        self._waiting[request.request_id] = _Waiting(now_s, self._ran, prompt_cost, cost)

    def hear(self, name: str, events: Sequence[Event], now_s: float) -> None:
        """What the engine says of a request."""
        waiting = self._waiting.get(name)
        if waiting is None:
            return
        if any(isinstance(event, TokenEvent) for event in events):
            self.remove(name, now_s)
        elif not waiting.has_started and any(isinstance(event, StartEvent) for event in events):
            self._remember(now_s, now_s - waiting.came_s)
            waiting.has_started, waiting.left_cost = True, waiting.prompt_cost

    def remove(self, name: str, now_s: float) -> None:
        """The request waits no longer, whatever became of it."""
        if (waiting := self._waiting.pop(name, None)) is not None:
            self._remember(now_s, self._late_s(waiting, now_s))

    def ran(self, stats: StepStats) -> None:
        """The replica has run these steps. May be called from another thread than the rest."""
        self._ran += sum(depth.executed for depth in stats.depth.values())

    @property
    def layer_tokens(self) -> float:
        """What waiting requests may cost, in layer-tokens."""
        return sum(waiting.left_cost for waiting in self._waiting.values()) / self._full_cost

    def report(self, now_s: float) -> tuple[float, float, float]:
        """`layer_tokens`, the seconds that the latest of the waiting requests or of the last WINDOW_S is late, and the
        layer-tokens per second that the replica has run since the last report."""
        self._forget(now_s)
        late_s = max((self._late_s(waiting, now_s) for waiting in self._waiting.values()), default=0.0)
        late_s = max([late_s, *(late_s for _, late_s in self._past)])
        since_s = 0.0 if self._reported_s is None else now_s - self._reported_s
        ran, self._ran_reported = self._ran - self._ran_reported, self._ran
        self._reported_s = now_s
        per_s = ran / self._full_cost / since_s if since_s > 0 else 0.0
        return self.layer_tokens, late_s, per_s

    def _remember(self, now_s: float, late_s: float) -> None:
        # Also where nobody asks for reports, as with a fixed number of replicas.
        self._forget(now_s)
        self._past.append((now_s, late_s))

    def _forget(self, now_s: float) -> None:
        while self._past and self._past[0][0] < now_s - WINDOW_S:
            self._past.popleft()

    def _late_s(self, waiting: _Waiting, now_s: float) -> float:
        waited_s = now_s - waiting.came_s
        ran = self._ran - waiting.ran_before
        if not waiting.has_started or not ran:
            return waited_s
        return waited_s * max(0, ran - waiting.prompt_cost) / ran
