from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from buddy_server.api.admin import AdminServices
from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import FakeEngine
from fakes.serving import Socket, listening
from fakes.site import Serve, Site
from fakes.tenancy import tenancy_of
from fakes.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(tokenizer_directory)


@pytest.fixture(scope="session")
def listener() -> Iterator[Socket]:
    with listening() as served:
        yield served


@pytest.fixture
def serve(listener: Socket, tokenizer: ChatTokenizer) -> Iterator[Serve]:
    """Puts up a server with an engine or config of the test's choice, in place of the one before."""
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=listener.url, timeout=10))

        def start(
            engine: FakeEngine | None = None,
            config: ServerConfig | None = None,
            admin: AdminServices | None = None,
            of_family: ChatTokenizer | None = None,
        ) -> Site:
            engine, config = engine or FakeEngine(), config or ServerConfig()
            metrics = Metrics(engine.info, config.tenants)
            tenancy = tenancy_of(engine, config, metrics)
            listener.app = create_app(config, engine, of_family or tokenizer, metrics, tenancy, admin)
            return Site(listener.url, engine, metrics, http, stack)

        yield start


@pytest.fixture
def site(serve: Serve) -> Site:
    return serve()
