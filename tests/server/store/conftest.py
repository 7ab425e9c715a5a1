"""Every test of the store runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from buddy_server.tenancy.store.database import Database
from postgres_process import Postgres, postgres


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'buddy.db'}"
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.create_database(f"test_{uuid4().hex}")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A database with tables."""
    opened = Database(url)
    await opened.migrate()
    yield opened
    await opened.close()
