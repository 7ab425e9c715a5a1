from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import openai
import pytest

from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import FakeEngine
from fakes.serving import served
from fakes.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Site:
    """A running server, its engine, and ways to talk to it."""

    url: str
    engine: FakeEngine
    metrics: Metrics
    http: httpx.Client

    def client(self, key: str = "sk-any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-any", max_retries=0, timeout=10)

    def chat(self, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
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
    def __call__(self, engine: FakeEngine | None = None, config: ServerConfig | None = None) -> Site: ...


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(tokenizer_directory)


@pytest.fixture
def serve(tokenizer: ChatTokenizer) -> Iterator[Serve]:
    """Starts a server, with an engine or config of the test's choice."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, config: ServerConfig | None = None) -> Site:
            engine, config = engine or FakeEngine(), config or ServerConfig()
            metrics = Metrics(engine.info, config.tenants)
            url = stack.enter_context(served(create_app(config, engine, tokenizer, metrics)))
            http = stack.enter_context(httpx.Client(base_url=url, timeout=10))
            return Site(url, engine, metrics, http)

        yield start


@pytest.fixture
def site(serve: Serve) -> Site:
    return serve()
