"""Sends a worker's events from a separate thread."""

import queue
import threading

import zmq

from buddy_server.engine.wire import WorkerEvent, encode

LINGER_MS = 2000
"""How long sending the last events may take."""


class Outbox:
    """`put` may be called from any thread and does not block. Events are sent in order."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._events: queue.SimpleQueue[WorkerEvent | None] = queue.SimpleQueue()
        self.put = self._events.put
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send everything, then return."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.connect(self._address)
            while (event := self._events.get()) is not None:
                socket.send(encode(event))
