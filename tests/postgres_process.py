"""A real PostgreSQL in a temporary folder, for the tests of the store."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from buddy_server.bench.server_process import free_port

PASSWORD = "pg-secret-password"
USER = "buddy"


@dataclass
class Postgres:
    """A server that tests may stop, freeze and start again."""

    folder: Path
    binaries: Path
    port: int = field(default_factory=free_port)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -F"
        self._control("start", "-w", "-o", options, "-l", str(self.folder / "log"))

    def stop(self) -> None:
        self._control("stop", "-m", "immediate", "-w")

    def pids(self) -> list[int]:
        """The server's processes."""
        main = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [main, *map(int, children)]

    def create_database(self, name: str) -> str:
        """The URL of a new, empty database."""
        connection = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER]
        environment = os.environ | {"PGPASSWORD": PASSWORD}
        command = [str(self.binaries / "createdb"), *connection, name]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return self.url(name)

    def _control(self, *arguments: str) -> None:
        _as_user([str(self.binaries / "pg_ctl"), "-D", str(self.folder / "data"), *arguments])


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; skips the test where there is none."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("NOT TESTED: the store on PostgreSQL. There is no initdb: apt-get install postgresql")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        password = folder / "password"
        password.write_text(PASSWORD)
        if os.getuid() == 0:
            # PostgreSQL refuses to run as root.
            shutil.chown(folder, "postgres")
            shutil.chown(password, "postgres")
        initdb = [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", USER, "-A", "scram-sha-256"]
        _as_user([*initdb, f"--pwfile={password}", "--no-sync"])
        server = Postgres(folder, binaries)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


def _as_user(command: Sequence[str]) -> None:
    prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    # The server that pg_ctl starts would keep a pipe open.
    done = subprocess.run([*prefix, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}"
