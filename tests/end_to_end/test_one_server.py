"""One server with SQLite and limits in memory: its configuration changes while it runs, and it is stopped and started
again."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from buddy_process import BUDDY
from end_to_end.tenant_site import ADMIN_KEY, KEY_SECRET, LONG, Served, Streamed, bearer, rows_of, served, tenants
from fakes.serving import wait_until

pytestmark = pytest.mark.slow

CHANGED_S = 2.0
"""How soon a changed file counts."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("one")
    config = {
        "tiers": {"limited": {"requests_per_minute": 500}, "quota": {"layer_tokens_per_month": 60}},
        "tenants": tenants({"acme": "limited", "spent": "quota"}),
        "store": {"url": f"sqlite:///{folder}/buddy.db"},
    }
    with served(folder, config) as server:
        yield server


def limit_of(site: Served) -> str:
    """Acme's requests per minute, as the server tells it."""
    return site.ask("sk-acme").headers["x-ratelimit-limit-requests"]


def test_changed_file_changes_a_limit_and_adds_a_tenant(site: Served) -> None:
    assert site.ask("sk-new").status_code == httpx.codes.UNAUTHORIZED
    site.config["tiers"]["limited"]["requests_per_minute"] = 600
    site.config["tenants"] |= tenants({"new": "limited"})
    site.write_config()
    wait_until(lambda: limit_of(site) == "600", CHANGED_S)
    assert site.ask("sk-new").status_code == httpx.codes.OK
    assert site.sample("buddy_requests_total", tenant="new", tier="limited", outcome="finished") == 1
    assert site.sample("buddy_config_reloads_total", result="applied") == 1


def test_hang_up_reads_the_file_at_once(site: Served) -> None:
    before = site.config_file.stat()
    site.config["tiers"]["limited"]["requests_per_minute"] = 700
    site.write_config()
    # Nothing but its content tells that it has changed.
    os.utime(site.config_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert site.process is not None
    site.process.send_signal(signal.SIGHUP)
    wait_until(lambda: limit_of(site) == "700", CHANGED_S)


def test_bad_file_keeps_the_old_configuration_and_says_which_line(site: Served) -> None:
    good = site.config_file.read_text()
    site.config_file.write_text("tiers:\n  limited:\n    requests_per_minute: many\n")
    wait_until(lambda: site.sample("buddy_config_reloads_total", result="refused") == 1, CHANGED_S)
    assert f"{site.config_file}:3: tiers.limited.requests_per_minute: 'many' is not allowed" in site.log
    assert limit_of(site) == "700"
    assert site.ask("sk-new").status_code == httpx.codes.OK
    applied = site.sample("buddy_config_reloads_total", result="applied")
    site.config_file.write_text(good)
    wait_until(lambda: site.sample("buddy_config_reloads_total", result="applied") > applied, CHANGED_S)


def test_no_secret_is_in_the_log_the_metrics_the_database_or_the_journal(site: Served) -> None:
    made = site.admin("POST", "/tenants/acme/keys", json={}).json()["key"]
    assert site.ask(made).status_code == httpx.codes.OK
    files = [path for path in site.folder.rglob("buddy.db*") if path.is_file()]
    files += (site.folder / "buddy.db.journals").iterdir()
    assert any(path.name == "buddy.db-wal" for path in files)
    content = b"".join(path.read_bytes() for path in files).decode("latin-1")
    shown = content + site.log + site.http.get(f"{site.url}/metrics").text
    secrets = (ADMIN_KEY, KEY_SECRET, made, made.partition("_")[2], "sk-acme", "sk-new", "sk-spent")
    assert [secret for secret in secrets if secret in shown] == []


def test_monthly_quota_survives_a_restart(site: Served) -> None:
    assert site.ask("sk-spent", **LONG | {"n": 1, "max_tokens": 50}).status_code == httpx.codes.OK
    assert site.ask("sk-spent", max_tokens=50).json()["error"]["code"] == "insufficient_quota"
    used = site.sample("buddy_quota_used_ratio", tenant="spent")
    assert used > 0.9
    site.stop()
    site.admin_key = None
    site.start()
    assert site.sample("buddy_quota_used_ratio", tenant="spent") == used
    assert site.ask("sk-spent", max_tokens=50).json()["error"]["code"] == "insufficient_quota"
    assert site.ask("sk-acme").status_code == httpx.codes.OK


def test_there_is_no_admin_api_without_an_admin_key(site: Served) -> None:
    assert site.admin_key is None
    for path in ("/tenants", "/usage", "/audit"):
        answer = site.http.get(f"{site.url}/admin{path}", headers=bearer(ADMIN_KEY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


def test_streams_finish_after_sigterm_and_the_ledger_has_them(site: Served) -> None:
    # As many tokens as a processor without wide vectors generates in the grace period.
    streams, fields = [Streamed() for _ in range(2)], LONG | {"n": 1, "max_tokens": 300}
    with ThreadPoolExecutor() as pool:
        streaming = [pool.submit(site.stream, "sk-acme", got, **fields) for got in streams]
        wait_until(lambda: all(got.num_tokens for got in streams), 10)
        site.stop()
        for future in streaming:
            future.result()
    rows = rows_of(site.config["store"]["url"])
    for got in streams:
        assert got.is_done
        assert got.num_tokens == fields["n"] * fields["max_tokens"]
        row = rows[got.response_id]
        assert (row.outcome, row.completion_tokens) == ("finished", got.num_tokens)
        assert round(row.milli_layers / (1000 * row.layers), 3) == got.layer_tokens
    assert list((site.folder / "buddy.db.journals").iterdir()) == []


def test_server_without_a_configuration_needs_no_key_and_writes_no_file(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("home", "work", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    site = Served(tmp_path, {})
    # The compiled step of the CPU is kept where it always is; everything else would show.
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    places = {"HOME": str(folders["home"]), "TMPDIR": str(folders["temporary"]), "XDG_CACHE_HOME": cache}
    with (tmp_path / "server.log").open("wb") as log:
        command = [BUDDY, "serve", "--port", str(site.port)]
        site.process = subprocess.Popen(command, stderr=log, env=os.environ | places, cwd=folders["work"])
    try:
        site.wait_until_ready()
        assert site.http.post(f"{site.url}/v1/completions", json={"model": "buddy-7m", "prompt": "hi"}).is_success
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", site.port))
    finally:
        site.stop()
    assert [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()] == []
