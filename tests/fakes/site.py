"""A running server as tests talk to it."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import httpx
import openai

from buddy_server.api.admin import AdminServices
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import FakeEngine


@dataclass(frozen=True)
class Site:
    """A running server, its engine, and ways to talk to it."""

    url: str
    engine: FakeEngine
    metrics: Metrics
    http: httpx.Client
    stack: ExitStack

    def client(self, key: str = "sk-any") -> openai.OpenAI:
        """The official client, closed at the end of the test."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)
        return self.stack.enter_context(client)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-any", max_retries=0, timeout=10)

    def chat(self, headers: dict[str, str] | None = None, /, **fields: object) -> httpx.Response:
        """POST a chat completion; `fields` go over the smallest body that works."""
        body = {"model": self.engine.info.model_id, "messages": [{"role": "user", "content": "hi"}]}
        return self.http.post("/v1/chat/completions", json=body | fields, headers=headers)

    def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric over the series that have `labels`, as GET /metrics tells it."""
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class Serve(Protocol):
    def __call__(
        self,
        engine: FakeEngine | None = None,
        config: ServerConfig | None = None,
        admin: AdminServices | None = None,
        of_family: ChatTokenizer | None = None,
    ) -> Site: ...
