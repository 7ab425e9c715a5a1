"""The ingress's metrics and those of all replicas, in one scrape."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest

from buddy_server.engine.messages import EngineClient, EngineInfo
from buddy_server.metrics import Metrics
from buddy_server.replicas.client import EngineReplicas
from buddy_server.replicas.replica_families import ReplicaFamilies
from buddy_server.tenancy.policy import Tenant


class ReplicatedMetrics(Metrics):
    """Requests and tenants are counted here, what engines do by their replicas, whose metrics get the label
    `replica`."""

    def __init__(self, info: EngineInfo, tenants: Iterable[Tenant]) -> None:
        super().__init__(info, tenants, has_engine=False)

    async def render(self, engine: EngineClient) -> bytes:
        """Asks the replicas of an EngineReplicas."""
        assert isinstance(engine, EngineReplicas)
        own, theirs = await super().render(engine), CollectorRegistry()
        theirs.register(ReplicaFamilies(await engine.metrics(), self.labels_of))
        return own + generate_latest(theirs)
