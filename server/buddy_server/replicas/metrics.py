"""The metrics of all ingresses and all replicas, in one scrape."""

import logging
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, generate_latest
from ray.serve.handle import DeploymentHandle

from buddy_server.engine.messages import EngineClient, EngineInfo
from buddy_server.metrics import Metrics
from buddy_server.replicas.broadcast import ANSWER_TIMEOUT_S, ask_all
from buddy_server.replicas.labelled_families import LabelledFamilies
from buddy_server.tenancy.policy import Tenant

log = logging.getLogger(__name__)


class ReplicatedMetrics(Metrics):
    """Requests and tenants are counted by `ingresses`, whose metrics get the label `ingress`, or by this process alone
    if they are None. What `engines` do is counted by their replicas, with the label `replica`."""

    def __init__(
        self, info: EngineInfo, tenants: Iterable[Tenant], ingresses: DeploymentHandle | None, engines: DeploymentHandle
    ) -> None:
        super().__init__(info, tenants, has_engine=False)
        self._ingresses = ingresses
        self._engines = engines

    async def render(self, engine: EngineClient) -> bytes:
        """Of all of them, whichever ingress is asked."""
        replicas = LabelledFamilies("replica", await _measured(self._engines), self.labels_of)
        if self._ingresses is None:
            return await super().render(engine) + _text(replicas)
        return _text(LabelledFamilies("ingress", await _measured(self._ingresses))) + _text(replicas)


def _text(families: LabelledFamilies) -> bytes:
    registry = CollectorRegistry()
    registry.register(families)
    return generate_latest(registry)


async def _measured(deployment: DeploymentHandle) -> list[tuple[str, list[Metric]]]:
    """The name and the metrics of every replica of `deployment`; of none, if one of them does not answer."""
    try:
        return await ask_all(deployment, "measure")
    except TimeoutError:
        log.warning("no metrics", extra={"of": deployment.deployment_name, "timeout_s": ANSWER_TIMEOUT_S})
        return []
