"""The admin API over HTTP: who may use it, what it changes, what it shows."""

import asyncio
import csv
import hashlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from buddy_server.api.admin import AdminServices
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tenancy.administration import Administration
from buddy_server.tenancy.keys import KeySecret, parse_key_id
from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.ledger_store import LedgerStore
from buddy_server.tenancy.store.tenant_store import TenantStore
from buddy_server.tenancy.tenancy import ADMIN_ACTOR
from fakes.book import FakeBook
from fakes.engine import INFO
from fakes.entries import entry
from fakes.serving import Socket
from fakes.site import Serve, Site

ADMIN_KEY = "admin-key-of-this-test"
TENANT_KEY = "sk-tenant-key"
SECRET = "key-secret-of-this-test"
PATHS = [
    ("GET", "/admin/tenants"),
    ("POST", "/admin/tenants"),
    ("GET", "/admin/tenants/acme"),
    ("PATCH", "/admin/tenants/acme"),
    ("GET", "/admin/tiers"),
    ("GET", "/admin/tiers/free"),
    ("PUT", "/admin/tiers/free"),
    ("DELETE", "/admin/tiers/free"),
    ("GET", "/admin/tenants/acme/keys"),
    ("POST", "/admin/tenants/acme/keys"),
    ("DELETE", "/admin/keys/0123456789ab"),
    ("GET", "/admin/usage"),
    ("GET", "/admin/audit"),
]


@dataclass(frozen=True)
class AdminSite:
    """A running server with a store, seen by one who has the admin key."""

    site: Site
    book: FakeBook
    folder: Path
    database: Database
    listener: Socket
    ledger: Ledger

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}", **options.pop("headers", {})}
        return self.site.http.request(method, f"/admin{path}", headers=headers, **options)

    def get(self, path: str) -> Any:
        response = self.call("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, method: str, path: str, **options: Any) -> tuple[int, str, str]:
        """The status, code and message of a call that is refused."""
        response = self.call(method, path, **options)
        error = response.json()["error"]
        return response.status_code, error["code"], error["message"]


@pytest.fixture
def admin(serve: Serve, listener: Socket, tmp_path: Path) -> Iterator[AdminSite]:
    database = Database(f"sqlite:///{tmp_path / 'buddy.db'}")
    asyncio.run(database.migrate())
    book = FakeBook()
    administration = Administration(TenantStore(database), book, KeySecret(SECRET.encode()), ADMIN_ACTOR)
    digest = hashlib.sha256(TENANT_KEY.encode()).digest()
    config = ServerConfig(tenants=(Tenant("filed", Tier("free"), (digest,)),))
    rows = LedgerStore(database)
    ledger = Ledger(rows, tmp_path / "journals", Metrics(INFO, []))
    site = serve(config=config, admin=AdminServices(ADMIN_KEY, administration, ledger, rows))
    site.http.get("/health")
    yield AdminSite(site, book, tmp_path, database, listener, ledger)
    ledger.close()
    listener.run(database.close())


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_admin_is_closed_without_the_admin_key(admin: AdminSite, method: str, path: str) -> None:
    for headers in ({}, {"authorization": f"Bearer {TENANT_KEY}"}, {"authorization": f"Basic {ADMIN_KEY}"}):
        # The body is not read before the key is checked.
        response = admin.site.http.request(method, path, headers=headers, content=b"{")
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert TENANT_KEY not in response.text


def test_admin_key_opens_nothing_else(admin: AdminSite) -> None:
    assert admin.site.chat({"authorization": f"Bearer {ADMIN_KEY}"}).status_code == 401
    assert admin.site.chat({"authorization": f"Bearer {TENANT_KEY}"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_admin_services_there_is_no_admin(serve: Serve, method: str, path: str) -> None:
    response = serve().http.request(method, path, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")


def test_tenant_is_created_moved_and_disabled(admin: AdminSite) -> None:
    admin.call("PUT", "/tiers/pro", json={"weight": 2})
    created = admin.call("POST", "/tenants", json={"name": "acme", "tier": "free"})
    assert created.status_code == 201
    assert created.json() == {"name": "acme", "tier": "free", "disabled": False, "source": "store"}
    assert admin.call("PATCH", "/tenants/acme", json={"tier": "pro"}).json()["tier"] == "pro"
    changed = admin.call("PATCH", "/tenants/acme", json={"disabled": True})
    assert changed.json() == {"name": "acme", "tier": "pro", "disabled": True, "source": "store"}
    assert admin.get("/tenants/acme") == changed.json()
    filed = {"name": "filed", "tier": "free", "disabled": False, "source": "file"}
    assert admin.get("/tenants") == {"data": [changed.json(), filed]}
    assert admin.book.num_refreshes == 4


def test_tier_is_created_replaced_and_deleted(admin: AdminSite) -> None:
    created = admin.call("PUT", "/tiers/pro", json={"max_budget": 1, "requests_per_minute": 10})
    assert created.status_code == 200
    assert admin.get("/tiers/pro") == created.json()
    assert (created.json()["name"], created.json()["source"]) == ("pro", "store")
    assert (created.json()["requests_per_minute"], created.json()["layer_tokens_per_minute"]) == (10, None)
    assert admin.call("PUT", "/tiers/pro", json={}).json()["requests_per_minute"] is None
    assert [tier["name"] for tier in admin.get("/tiers")["data"]] == ["free", "pro"]
    assert admin.get("/tiers/free")["source"] == "file"
    assert admin.call("DELETE", "/tiers/pro").status_code == 204
    assert admin.refused("GET", "/tiers/pro") == (404, "tier_not_found", "There is no tier 'pro'.")


def test_what_is_in_the_file_is_changed_only_there(admin: AdminSite) -> None:
    for method, path, body in (
        ("POST", "/tenants", {"name": "filed", "tier": "free"}),
        ("PATCH", "/tenants/filed", {"disabled": True}),
        ("PUT", "/tiers/free", {}),
        ("DELETE", "/tiers/free", None),
    ):
        status, code, message = admin.refused(method, path, json=body)
        assert (status, code) == (409, "conflict")
        assert message.endswith("belongs to the configuration file; change or remove it there.")


def test_the_files_definition_counts_for_a_name_in_both(admin: AdminSite) -> None:
    admin.call("PUT", "/tiers/pro", json={"weight": 2})
    admin.call("POST", "/tenants", json={"name": "acme", "tier": "pro"})
    pro = Tier("pro", weight=3)
    admin.book.file_tiers["pro"] = pro
    admin.book.file_tenants["acme"] = Tenant("acme", pro)
    assert admin.get("/tiers/pro")["weight"] == 3
    assert admin.get("/tenants/acme")["source"] == "file"


@pytest.mark.parametrize(
    ("method", "path", "body", "refusal"),
    [
        ("POST", "/tenants", {"name": "a b", "tier": "free"}, (400, None, "name: 'a b' is not allowed")),
        ("POST", "/tenants", {"name": "acme"}, (400, None, "tier: this field is required")),
        ("POST", "/tenants", {"name": "acme", "tier": "gold"}, (400, None, "tier: 'gold' is not a tier, allowed: f")),
        ("POST", "/tenants", {"name": "a", "tier": "free", "x": 1}, (400, None, "x: 1 is not allowed: Extra inputs")),
        ("PATCH", "/tenants/nobody", {"disabled": True}, (404, "tenant_not_found", "There is no tenant 'nobody'.")),
        ("PATCH", "/tenants/nobody", {}, (400, None, "The request body: give tier, disabled or both")),
        ("PUT", "/tiers/pro", {"weight": 0}, (400, None, "weight: 0 is not allowed")),
        ("PUT", "/tiers/pro", {"max_budget": 0.01}, (400, None, "tiers.pro.max_budget: 0.01 is too small")),
        ("PUT", "/tiers/pro", {"min_budget": 1, "max_budget": 0.5}, (400, None, "The request body: allowed is min_")),
        ("GET", "/tenants/nobody/keys", None, (404, "tenant_not_found", "There is no tenant 'nobody'.")),
        ("POST", "/tenants/nobody/keys", {}, (404, "tenant_not_found", "There is no tenant 'nobody'.")),
        ("POST", "/tenants/filed/keys", {"expires_at": "2020-01-01T00:00:00Z"}, (400, None, "expires_at: 2020-01-01")),
        ("POST", "/tenants/filed/keys", {"expires_at": "2050-01-01T00:00:00"}, (400, None, "expires_at: '2050-01-01T")),
        ("DELETE", "/keys/0123456789ab", None, (404, "key_not_found", "There is no key with this id")),
        ("GET", "/usage?from=yesterday", None, (400, None, "from: 'yesterday' is not allowed: allowed is a day like")),
        ("GET", "/usage?to=20261126", None, (400, None, "to: '20261126' is not allowed: allowed is a day like 2026-")),
        ("GET", "/usage?from=2026-11-26&to=2026-11-25", None, (400, None, "to: 2026-11-25 is before from, allowed is")),
        ("GET", "/usage?group_by=week", None, (400, None, "group_by: 'week' is not allowed: allowed are tenant, day")),
        ("GET", "/usage?format=xml", None, (400, None, "format: 'xml' is not allowed: Input should be 'json'")),
        ("GET", "/usage?tenent=acme", None, (400, None, "tenent: 'acme' is not allowed: Extra inputs")),
        ("GET", "/usage?tenant=%00", None, (400, None, "tenant: '\\x00' is not allowed: String should match pattern")),
        ("PATCH", "/tenants/%00", {"disabled": True}, (400, None, "name: '\\x00' is not allowed: String should")),
        ("DELETE", "/keys/%00", None, (404, "key_not_found", "There is no key with this id")),
        ("GET", f"/audit?before={10**30}", None, (400, None, "before: '1000000000000000000000000000000' is not all")),
        ("GET", "/audit?limit=0", None, (400, None, "limit: '0' is not allowed: Input should be greater than")),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named_with_what_is(
    admin: AdminSite, method: str, path: str, body: object, refusal: tuple[int, str | None, str]
) -> None:
    status, code, message = admin.refused(method, path, json=body)
    assert (status, code, message[: len(refusal[2])]) == refusal
    assert admin.get("/audit") == {"data": []}


def test_malformed_json_is_refused(admin: AdminSite) -> None:
    headers = {"content-type": "application/json"}
    status, _, message = admin.refused("POST", "/tenants", content=b"{", headers=headers)
    assert (status, message[:34]) == (400, "The request body is not valid JSON")


@pytest.mark.parametrize("body", [b'{"name": "\xff"}', b'{"name": ' + b"[" * 100_000, b"1" * 5000])
def test_body_that_is_no_json_a_server_reads_gets_400(admin: AdminSite, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    status, code, message = admin.refused("POST", "/tenants", content=body, headers=headers)
    assert (status, code) == (400, None)
    assert message == "The request body cannot be read; allowed is JSON in UTF-8, not too deep."


@pytest.mark.parametrize("announced", [True, False])
def test_body_over_the_limit_gets_413(admin: AdminSite, announced: bool) -> None:
    body = b" " * (ServerConfig().max_body_bytes + 1)
    headers = {"content-type": "application/json"}
    content = body if announced else iter([body[:1000], body[1000:]])
    status, code, _ = admin.refused("POST", "/tenants", content=content, headers=headers)
    assert (status, code) == (413, "request_too_large")


def test_key_is_shown_once_and_revoked(admin: AdminSite) -> None:
    made = admin.call("POST", "/tenants/filed/keys", json={"expires_at": "2050-01-01T01:00:00+01:00"})
    assert made.status_code == 201
    fields = made.json()
    key = fields.pop("key")
    assert parse_key_id(key) == fields["id"]
    assert fields["expires_at"] == "2050-01-01T00:00:00Z"
    assert admin.get("/tenants/filed/keys") == {"data": [fields]}
    assert admin.call("DELETE", f"/keys/{fields['id']}").status_code == 204
    (revoked,) = admin.get("/tenants/filed/keys")["data"]
    assert fields["revoked_at"] is None
    assert revoked["revoked_at"] is not None
    (stored,) = admin.listener.run(TenantStore(admin.database).snapshot()).keys
    assert KeySecret(SECRET.encode()).matches(key, stored.mac)
    assert not stored.is_valid(stored.created_ms + 1000)


def test_key_without_a_body_is_valid_until_it_is_revoked(admin: AdminSite) -> None:
    made = admin.call("POST", "/tenants/filed/keys")
    assert (made.status_code, made.json()["expires_at"]) == (201, None)


def test_neither_key_nor_secret_is_in_any_file_or_answer(admin: AdminSite) -> None:
    key = admin.call("POST", "/tenants/filed/keys", json={}).json()["key"]
    secrets = [key, key.partition("_")[2], SECRET, ADMIN_KEY]
    # A whole key in place of its id, by mistake, is not repeated.
    answers = [admin.call("GET", path).text for path in ("/tenants/filed/keys", "/audit", "/usage")]
    answers += [admin.call("DELETE", f"/keys/{key}").text]
    files = [path.read_bytes() for path in admin.folder.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [secret for secret in secrets for answer in answers if secret in answer]
    assert not [secret for secret in secrets for content in files if secret.encode() in content]


def test_every_change_is_audited(admin: AdminSite) -> None:
    admin.call("PUT", "/tiers/pro", json={"weight": 2})
    admin.call("POST", "/tenants", json={"name": "acme", "tier": "pro"})
    admin.call("PATCH", "/tenants/acme", json={"tier": "free"})
    key = admin.call("POST", "/tenants/acme/keys", json={}).json()
    admin.call("DELETE", f"/keys/{key['id']}")
    admin.call("DELETE", "/tiers/pro")
    rows = admin.get("/audit")["data"]
    assert [(row["action"], row["subject"]) for row in rows] == [
        ("tier.delete", "pro"),
        ("key.revoke", key["id"]),
        ("key.create", key["id"]),
        ("tenant.change", "acme"),
        ("tenant.create", "acme"),
        ("tier.create", "pro"),
    ]
    assert {row["actor"] for row in rows} == {"admin key"}
    assert rows[3]["details"] == {"tier": "free"}
    assert admin.get(f"/audit?limit=2&before={rows[1]['id']}")["data"] == rows[2:4]


def write_usage(admin: AdminSite) -> None:
    def entry(number: int, tenant: str, key_id: str | None, day: str) -> LedgerEntry:
        return LedgerEntry(
            id=f"chatcmpl-{number}", tenant=tenant, key_id=key_id, model="buddy-7m", layers=8, day=day, started_ms=1,
            ended_ms=2, budget_requested=0.5, budget_granted=0.5, decided_by="request", prompt_tokens=7,
            completion_tokens=3, milli_layers=4001, outcome="finished",
        )  # fmt: skip

    entries = [
        entry(1, "acme", "0123456789ab", "2026-11-25"),
        entry(2, "acme", "0123456789ab", "2026-11-26"),
        entry(3, "acme", None, "2026-11-26"),
        entry(4, "hobby", "ffffffffffff", "2026-11-26"),
    ]
    admin.listener.run(LedgerStore(admin.database).write(entries))


def test_usage_is_summed_by_tenant_day_and_key(admin: AdminSite) -> None:
    write_usage(admin)
    sums = {"requests": 1, "prompt_tokens": 7, "completion_tokens": 3, "layer_tokens": 0.5}
    assert admin.get("/usage?group_by=tenant,day,key&tenant=acme&from=2026-11-26&to=2026-11-26") == {
        "data": [
            {"tenant": "acme", "day": "2026-11-26", "key": None, **sums},
            {"tenant": "acme", "day": "2026-11-26", "key": "0123456789ab", **sums},
        ]
    }
    assert admin.get("/usage?tenant=acme") == {
        "data": [{"tenant": "acme", "requests": 3, "prompt_tokens": 21, "completion_tokens": 9, "layer_tokens": 1.5}]
    }


def test_usage_has_what_has_just_ended(admin: AdminSite) -> None:
    admin.ledger.begin(entry("ended"))
    admin.ledger.end(entry("ended", outcome="finished"))
    assert [row["requests"] for row in admin.get("/usage")["data"]] == [1]


def test_empty_query_parameters_count_as_absent(admin: AdminSite) -> None:
    write_usage(admin)
    assert admin.get("/usage?tenant=&from=&to=&group_by=&format=") == admin.get("/usage")
    assert admin.get("/audit?limit=&before=") == admin.get("/audit")


def test_usage_is_csv_for_those_who_ask(admin: AdminSite) -> None:
    write_usage(admin)
    response = admin.call("GET", "/usage?group_by=day,tenant&format=csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert list(csv.reader(io.StringIO(response.text))) == [
        ["tenant", "day", "requests", "prompt_tokens", "completion_tokens", "layer_tokens"],
        ["acme", "2026-11-25", "1", "7", "3", "0.5"],
        ["acme", "2026-11-26", "2", "14", "6", "1.0"],
        ["hobby", "2026-11-26", "1", "7", "3", "0.5"],
    ]
    accepting = {"accept": "text/csv"}
    assert admin.call("GET", "/usage?group_by=day,tenant", headers=accepting).text == response.text
    assert "data" in admin.call("GET", "/usage?format=json", headers=accepting).json()


def test_store_that_is_away_is_a_503_that_reveals_nothing(admin: AdminSite) -> None:
    shutil.rmtree(admin.folder)
    # Connections that are open would still see the file.
    admin.listener.run(admin.database.close())
    response = admin.call("GET", "/tenants")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unreachable")
    assert response.headers["retry-after"] == "1"
    assert str(admin.folder) not in response.text


def test_admin_is_on_the_documentation_page(admin: AdminSite) -> None:
    page = admin.site.http.get("/docs")
    assert page.status_code == 200
    assert "POST /admin/tenants" in page.text


def test_admin_is_in_the_openapi_document(admin: AdminSite) -> None:
    document = admin.site.http.get("/openapi.json").json()
    documented = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods if "/admin" in path
    }
    assert {path.count("/") for _, path in documented} == {2, 3, 4}
    assert len(documented) == len(PATHS)
    tenants = document["paths"]["/admin/tenants"]["post"]
    assert tenants["security"] == [{"admin-key": []}]
    assert set(tenants["responses"]) == {"201", "4XX", "500", "503"}
    assert not document["paths"]["/admin/tenants/{name}/keys"]["post"]["requestBody"].get("required", False)
    usage = document["paths"]["/admin/usage"]["get"]
    assert "text/csv" in usage["responses"]["200"]["content"]
    described = {each["name"]: each.get("description") for each in usage["parameters"]}
    assert described["from"] == "the first day in UTC, inclusive"
    assert described["to"] == "the last day in UTC, inclusive"
    assert described["group_by"] == "what to sum by: any of tenant, day and key, with commas between them"
