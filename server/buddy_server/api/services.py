"""The objects that every endpoint needs, passed as one."""

from dataclasses import dataclass

from fastapi import Request

from buddy_server.config import ServerConfig
from buddy_server.engine.messages import EngineClient
from buddy_server.metrics import Metrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.policy import Tenant
from buddy_server.tenancy.request_life import RequestLife
from buddy_server.tenancy.tenants import TenantDirectory
from buddy_server.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Services:
    config: ServerConfig
    engine: EngineClient
    tokenizer: ChatTokenizer
    metrics: Metrics
    tenants: TenantDirectory
    capacity: Capacity

    def authenticate(self, request: Request) -> Tenant:
        """The tenant that sent `request`. Raises InvalidApiKey."""
        return self.tenants.authenticate(request.headers.get("authorization"))

    def begin(self, tenant: Tenant) -> RequestLife:
        """Start the life of a request sent by `tenant`."""
        return RequestLife(self.capacity, self.metrics.request(tenant))
