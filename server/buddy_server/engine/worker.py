"""The engine's own process: `python -m buddy_server.engine.worker DIRECTORY`, which contains its parent's sockets.

The main thread runs the steps. One thread reads commands, another sends events: a step's events are encoded and sent
while the next step computes without the GIL. A third sends heartbeats. The process ends with its parent.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import zmq

from buddy_server.engine.outbox import Outbox
from buddy_server.engine.wire import (
    Build,
    BuildFailed,
    Building,
    Heartbeat,
    Ready,
    Stop,
    commands_address,
    decode_command,
    events_address,
)
from buddy_server.logs import configure_logs

if TYPE_CHECKING:
    from buddy_server.engine.loop import EngineLoop
    from buddy_server.engine.settings import EnginePlan

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
STEP_LIMIT_S = 120.0
"""A step takes a few seconds at most, on the slowest machine with the largest model that anyone has patience for."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    directory = sys.argv[1]
    follow_parent()
    configure_logs()
    threading.excepthook = _end_with_thread
    commands: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    commands.setsockopt(zmq.RCVHWM, 0)
    commands.bind(commands_address(directory))
    outbox = Outbox(events_address(directory))
    status = 0
    try:
        first = decode_command(commands.recv())
        assert isinstance(first, Build)
        outbox.put(Building())
        serve(first.plan, commands, outbox)
    except Exception:
        log.exception("engine process failed")
        status = 1
    outbox.close()
    # Everything is sent. A normal exit would wait for threads that wait for commands.
    os._exit(status)


def serve(plan: "EnginePlan", commands: "zmq.Socket[bytes]", outbox: Outbox) -> None:
    """Build the engine and run it until Stop. Errors that the user can fix go to the parent as one line."""
    # Imported only now, while the process already follows its parent: torch takes a while to import.
    from buddy_routing.embedded import MODEL_ID
    from buddy_server.engine.build import BUILD_ERRORS, build_engine
    from buddy_server.engine.loop import EngineLoop
    from buddy_server.engine.steppers import pin_threads

    log.info("loading", extra={"model": plan.model or MODEL_ID})
    try:
        built = build_engine(plan.model, plan.router, plan.settings, plan.device, plan.dtype)
    except BUILD_ERRORS as error:
        outbox.put(BuildFailed(str(error)))
        return
    loop = EngineLoop(built.engine, outbox.put)
    threading.Thread(target=read_commands, args=(commands, loop), name="commands", daemon=True).start()
    outbox.put(Ready(built.info, str(built.directory)))
    threading.Thread(target=beat, args=(loop, outbox), name="heartbeat", daemon=True).start()
    # Existing objects stay: a full garbage collection would now and then hold up every stream for a tenth of a second.
    gc.collect()
    gc.freeze()
    # Comes right before the loop: threads inherit their CPU affinity.
    pin_threads(built.engine.runner.stepper)
    loop.run()


def read_commands(commands: "zmq.Socket[bytes]", loop: "EngineLoop") -> None:
    """Pass on commands until Stop."""
    command = None
    while not isinstance(command, Stop):
        command = decode_command(commands.recv())
        assert not isinstance(command, Build)
        loop.inbox.put(command)


def beat(loop: "EngineLoop", outbox: Outbox) -> None:
    """Send a heartbeat every HEARTBEAT_S, unless the current step has exceeded STEP_LIMIT_S."""
    while True:
        started_s = loop.turn_started_s
        if started_s is None or time.monotonic() - started_s < STEP_LIMIT_S:
            outbox.put(Heartbeat())
        time.sleep(HEARTBEAT_S)


def follow_parent() -> None:
    """End when the parent has ended, however it ended, and not before. SIGINT from a terminal and SIGTERM from a
    service manager reach the whole process group, but running requests have a grace period, which the parent keeps."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        # The kernel does this without the GIL, which a hanging step may hold.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_at_end_of_input, name="parent", daemon=True).start()


def _exit_at_end_of_input() -> None:
    """The parent holds the other end of standard input while it lives."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _end_with_thread(failed: threading.ExceptHookArgs) -> None:
    """Other threads would wait for one that failed, and clients for them; a new process is better."""
    log.critical("engine thread failed", exc_info=failed.exc_value)
    os._exit(1)


if __name__ == "__main__":
    main()
