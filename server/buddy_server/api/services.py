"""The objects that every endpoint needs, passed as one."""

from dataclasses import dataclass

from fastapi import Request

from buddy_server.api.response_format import GrammarCompiler
from buddy_server.config import ServerConfig
from buddy_server.engine.messages import EngineClient
from buddy_server.metrics import Metrics
from buddy_server.tenancy.capacity import Capacity
from buddy_server.tenancy.request_life import RequestLife
from buddy_server.tenancy.tenancy import Tenancy
from buddy_server.tenancy.tenants import Caller
from buddy_server.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Services:
    config: ServerConfig
    engine: EngineClient
    tokenizer: ChatTokenizer
    metrics: Metrics
    tenancy: Tenancy
    capacity: Capacity
    compiler: GrammarCompiler

    def authenticate(self, request: Request) -> Caller:
        """Who sent `request`. Raises InvalidApiKey, TenantDisabled."""
        return self.tenancy.book.authenticate(request.headers.get("authorization"))

    def begin(self, caller: Caller) -> RequestLife:
        """Start the life of a request sent by `caller`."""
        return RequestLife(self.capacity, self.tenancy.bills, self.metrics.request(caller.tenant))
