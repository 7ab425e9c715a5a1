"""A worker (worker.py) seen from its parent: one child process, from start to end."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import zmq

from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import (
    Build,
    BuildFailed,
    Building,
    Command,
    Ready,
    WorkerEvent,
    commands_address,
    decode_event,
    encode,
    events_address,
)
from buddy_server.errors import EngineStartError

TICK_S = 0.1
"""How often a silent child is checked."""


class WorkerProcess:
    """A started child process. It ends with `close`, and on Linux also with the thread that started it. `load_s` is how
    long it took to be ready.

    Call `send` from one thread at a time, everything else from a single thread.
    """

    def __init__(self, plan: EnginePlan) -> None:
        """Raises EngineStartError if the sockets or the process cannot be created, OSError if there is no directory for
        temporary files."""
        self.started_s = time.monotonic()
        self.load_s = 0.0
        self._directory = tempfile.TemporaryDirectory(prefix="buddy-")
        self._context = zmq.Context()
        # Sending never waits on a full queue: the number of open requests bounds its length.
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._context.setsockopt(option, 0)
        # -P: do not import from the current directory.
        command = [sys.executable, "-P", "-m", "buddy_server.engine.worker", self._directory.name]
        try:
            self._events = self._context.socket(zmq.PULL)
            self._commands = self._context.socket(zmq.PUSH)
            self._events.bind(events_address(self._directory.name))
            # Connected, not bound: commands then wait for the child, where a bound socket would refuse them.
            self._commands.connect(commands_address(self._directory.name))
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603, all of it is ours
        except (zmq.ZMQError, OSError) as error:
            self._context.destroy()
            self._directory.cleanup()
            raise EngineStartError(f"the engine's process cannot be started: {error}") from error
        self.send(Build(plan))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.poll()

    def wait_until_ready(self, given_up: Callable[[], bool] = lambda: False) -> Ready:
        """Raises EngineStartError and closes the child if it cannot build the engine, has ended, or was given up."""
        try:
            return self._first_event(given_up)
        except BaseException:
            self.close()
            raise

    def _first_event(self, given_up: Callable[[], bool]) -> Ready:
        for event in self.events():
            if isinstance(event, Building):
                # Removed now, so that nobody else finds the sockets and nothing is left behind if we are killed.
                self._directory.cleanup()
            if isinstance(event, Ready):
                self.load_s = time.monotonic() - self.started_s
                return event
            if isinstance(event, BuildFailed):
                raise EngineStartError(event.reason)
            if given_up():
                raise EngineStartError("the server is shutting down")
        raise EngineStartError(f"the engine's process ended with status {self.returncode} before it was ready")

    def send(self, command: Command) -> None:
        self._commands.send(encode(command), zmq.NOBLOCK)

    def events(self) -> Iterator[WorkerEvent | None]:
        """The child's events, and None after every TICK_S of silence, until it has ended and all events are read."""
        has_ended = False
        while True:
            if self._events.poll(round(TICK_S * 1000)):
                yield decode_event(self._events.recv())
            elif has_ended:
                return
            else:
                has_ended = self.returncode is not None
                yield None

    def close(self) -> None:
        """End the child at once, if it has not ended. May be called more than once."""
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._context.destroy()
        self._directory.cleanup()
