"""A client that leaves stops the work, whatever it asked for."""

import socket
from contextlib import closing

import pytest

from fakes.engine import INFO, FakeEngine
from fakes.serving import wait_until
from fakes.site import Serve, Site


@pytest.fixture
def slow_site(serve: Serve) -> Site:
    return serve(FakeEngine(delay_s=0.01, num_words=150))


def cancelled_and_idle(site: Site, num_choices: int) -> bool:
    return len(site.engine.cancelled) == num_choices and not site.engine.finished


@pytest.mark.parametrize("n", [1, 3])
def test_client_that_leaves_a_stream_cancels_it(slow_site: Site, n: int) -> None:
    stream = slow_site.client().chat.completions.create(
        model=INFO.model_id, messages=[{"role": "user", "content": "hi"}], stream=True, n=n
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: cancelled_and_idle(slow_site, n))
    wait_until(lambda: slow_site.sample("buddy_requests_total", outcome="cancelled") == 1)


def test_client_that_leaves_in_the_middle_of_its_body_is_counted_as_cancelled(slow_site: Site) -> None:
    port = int(slow_site.url.rpartition(":")[2])
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"model')
    wait_until(lambda: slow_site.sample("buddy_requests_total", outcome="cancelled") == 1)
    assert slow_site.engine.requests == []
