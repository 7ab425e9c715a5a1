"""A server's tenancy for a fake engine, whose accounts it receives."""

from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tenancy.tenancy import Tenancy
from fakes.engine import FakeEngine


def tenancy_of(engine: FakeEngine, config: ServerConfig, metrics: Metrics) -> Tenancy:
    tenancy = Tenancy(config, None, engine.info, metrics)
    engine.settle = tenancy.bills.account
    return tenancy
