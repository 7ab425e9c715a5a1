"""Room for answers, and who may take how much of it."""

from buddy_server.config import ServerConfig
from buddy_server.errors import Overloaded
from buddy_server.metrics import Metrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.policy import Tenant, Tier
from fakes.engine import FakeEngine
from fakes.tenancy import tenancy_of


def capacity_of(*tenants: str) -> Capacity:
    """Room for 100 answers."""
    config = ServerConfig(tuple(Tenant(name, Tier("all"), (name.encode(),)) for name in tenants), max_waiting=96)
    engine = FakeEngine()
    return Capacity(engine, tenancy_of(engine, config, Metrics(engine.info, config.tenants)).book)


def taken(capacity: Capacity, tenant: str) -> int:
    """Answers that the tenant gets until it is refused."""
    count = 0
    while True:
        try:
            capacity.reserve(tenant, 1)
        except Overloaded:
            return count
        count += 1


def test_tenant_alone_takes_all_places() -> None:
    assert taken(capacity_of("acme"), "acme") == 100


def test_tenant_that_floods_leaves_places_for_others() -> None:
    capacity = capacity_of("flood", "small", "other")
    assert taken(capacity, "flood") == 80
    assert taken(capacity, "small") == 16
    assert taken(capacity, "other") >= 1


def test_released_places_are_free_for_everyone() -> None:
    capacity = capacity_of("flood", "small")
    taken(capacity, "flood")
    capacity.release("flood", 80)
    assert taken(capacity, "small") == 80
