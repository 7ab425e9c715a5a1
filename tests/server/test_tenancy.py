"""What keeps tenancy up to date, and what ends with it."""

import asyncio
import logging

import pytest

from buddy_server.tenancy.tenancy import persistent

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_loop_that_fails_is_logged_and_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("buddy_server.tenancy.tenancy.AGAIN_S", 0.01)
    starts = 0

    async def run() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(persistent(run), 5)
    assert starts == 3
    assert [record.message for record in caplog.records] == ["a loop failed and starts again"] * 2
