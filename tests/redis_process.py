"""A real Redis for tests."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from buddy_server.bench.server_process import free_port
from fakes.serving import wait_until

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server: apt-get install redis-server"
)


class RedisProcess:
    """A Redis on a free port of the loopback that keeps nothing on disk and asks for `password`. Killed, it can be
    started again under the same URL."""

    password = "secret-of-redis"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://:{self.password}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Return when it answers."""
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self._port), "--requirepass", self.password]
        command += ["--save", "", "--appendonly", "no", "--dir", self._folder]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, timeout_s=20)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.url, decode_responses=True)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def redis_process() -> Iterator[RedisProcess]:
    with tempfile.TemporaryDirectory() as folder:
        process = RedisProcess(folder)
        process.start()
        try:
            yield process
        finally:
            process.kill()
