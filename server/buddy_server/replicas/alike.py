"""Replicas compute alike: the first one to measure which arithmetic is fastest decides for all."""

import logging

from ray.experimental import internal_kv

from buddy_server.engine.settings import EnginePlan
from buddy_server.engine.wire import Ready
from buddy_server.engine.worker_process import WorkerProcess
from buddy_server.errors import EngineStartError

log = logging.getLogger(__name__)


def start_alike(plan: EnginePlan) -> tuple[EnginePlan, WorkerProcess, Ready]:
    """An engine's process that is ready, and the plan that it follows. An arithmetic in the plan's settings counts;
    otherwise it is that of the cluster's other engines of this plan. Raises EngineStartError."""
    key = f"buddy/{plan!r}/arithmetic".encode()
    known = internal_kv._internal_kv_get(key)
    if known is not None:
        plan = plan.with_arithmetic(known.decode())
    worker = WorkerProcess(plan)
    ready = worker.wait_until_ready()
    mine = ready.info.arithmetic
    # The first to write wins; replicas measure at the same time.
    internal_kv._internal_kv_put(key, mine.encode(), overwrite=False)
    first = internal_kv._internal_kv_get(key).decode()
    if first == mine:
        return plan, worker, ready
    worker.close()
    log.info("starting again with the arithmetic of the other replicas", extra={"own": mine, "theirs": first})
    plan = plan.with_arithmetic(first)
    worker = WorkerProcess(plan)
    return plan, worker, worker.wait_until_ready()


def check_same(version: str, worker: WorkerProcess, ready: Ready) -> None:
    """Close `worker` and raise EngineStartError unless it serves what the first replica of `version` does: the model's
    files may have changed since."""
    key, served = f"buddy/{version}/fingerprint".encode(), ready.info.system_fingerprint
    internal_kv._internal_kv_put(key, served.encode(), overwrite=False)
    first = internal_kv._internal_kv_get(key).decode()
    if served != first:
        worker.close()
        raise EngineStartError(f"the model or its router is now {served}, not {first}; deploy again to serve it")
