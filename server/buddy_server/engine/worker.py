"""The engine's own process: `python -m buddy_server.engine.worker DIRECTORY`, in which its parent's sockets are.

Its main thread steps. One thread takes commands, another sends events: a step's events are encoded and sent while the
next step computes, which it does without the GIL. The process lives no longer than its parent.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import zmq

from buddy_server.engine.outbox import Outbox
from buddy_server.engine.wire import (
    Build,
    BuildFailed,
    Building,
    PredictDepth,
    PredictedDepth,
    Ready,
    Stop,
    commands_address,
    decode_command,
    events_address,
)
from buddy_server.logs import configure_logs

if TYPE_CHECKING:
    from buddy_server.engine.depth_predictor import DepthPredictor
    from buddy_server.engine.loop import EngineLoop
    from buddy_server.engine.settings import EnginePlan

log = logging.getLogger(__name__)

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
    # All is said. The interpreter would wait for threads that wait for commands.
    os._exit(status)


def serve(plan: "EnginePlan", commands: "zmq.Socket[bytes]", outbox: Outbox) -> None:
    """Build the engine and run it until Stop. What the user can put right goes to the parent in one line."""
    # Only now, with the parent being followed: torch takes a while to import.
    from buddy_routing.embedded import MODEL_ID
    from buddy_server.engine.build import BUILD_ERRORS, build_engine, pin_threads
    from buddy_server.engine.loop import EngineLoop

    log.info("loading", extra={"model": plan.model or MODEL_ID})
    try:
        built = build_engine(plan.model, plan.router, plan.settings, plan.device, plan.dtype)
    except BUILD_ERRORS as error:
        outbox.put(BuildFailed(str(error)))
        return
    loop = EngineLoop(built.engine, outbox.put)
    reader = CommandReader(commands, loop, built.depth_predictor, outbox)
    threading.Thread(target=reader.run, name="commands", daemon=True).start()
    outbox.put(Ready(built.info, str(built.directory), built.depth_predictor is not None))
    # What is there now stays. To sweep over all of it would hold up every stream for a tenth of a second, now and then.
    gc.collect()
    gc.freeze()
    # The last thing before the loop: threads inherit where they may run.
    pin_threads(built.engine)
    loop.run()


class CommandReader:
    """Hands commands on: to the loop, and questions of depth to a thread of their own; a long prompt takes a moment."""

    def __init__(
        self,
        commands: "zmq.Socket[bytes]",
        loop: "EngineLoop",
        depth_predictor: "DepthPredictor | None",
        outbox: Outbox,
    ) -> None:
        self._commands = commands
        self._loop = loop
        self._depth_predictor = depth_predictor
        self._outbox = outbox
        self._thinking = ThreadPoolExecutor(1, "depth")

    def run(self) -> None:
        """Until Stop."""
        command = None
        while not isinstance(command, Stop):
            command = decode_command(self._commands.recv())
            if isinstance(command, PredictDepth):
                self._thinking.submit(self._predict, command)
            else:
                assert not isinstance(command, Build)
                self._loop.inbox.put(command)

    def _predict(self, question: PredictDepth) -> None:
        num_run_layers = None
        try:
            assert self._depth_predictor is not None
            num_run_layers = self._depth_predictor.choose(question.prompt_tokens, question.lowest, question.highest)
        except Exception:
            log.exception("predicting a depth failed")
        self._outbox.put(PredictedDepth(question.question_id, num_run_layers))


def follow_parent() -> None:
    """End when the parent has ended, however it did, and not before: SIGINT from a terminal and SIGTERM from a service
    manager reach the whole group of processes, but running requests have a grace period that the parent keeps."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        # The kernel needs no GIL for it, should a step hang while it holds that.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_at_end_of_input, name="parent", daemon=True).start()


def _exit_at_end_of_input() -> None:
    """The parent holds the other end of standard input for as long as it lives."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _end_with_thread(failed: threading.ExceptHookArgs) -> None:
    """The others would wait for a thread that failed, and clients for them; a new process is better."""
    log.critical("engine thread failed", exc_info=failed.exc_value)
    os._exit(1)


if __name__ == "__main__":
    main()
