"""Who may ask: keys, and the file they come from."""

import hashlib
from pathlib import Path

import openai
import pytest

from buddy_server.config import ServerConfig, StoreSettings, load_config
from buddy_server.errors import ConfigError
from buddy_server.tenancy.policy import Tenant, Tier
from buddy_server.tenancy.store.database import Database
from fakes.site import Serve

EXAMPLE = Path(__file__).parents[2] / "deploy" / "tenants.example.yaml"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_key_decides_tenant_and_tier(serve: Serve) -> None:
    site = serve(config=load_config(EXAMPLE))
    bearer = {"authorization": "Bearer sk-example-hobby"}
    assert site.chat(bearer, budget=1).json()["buddy"]["budget_granted"] == 0.5
    assert site.chat({"authorization": "bearer sk-example-acme"}).json()["buddy"]["budget_granted"] == 1.0
    assert [request.tenant for request in site.engine.requests] == ["hobby", "acme"]
    assert site.sample("buddy_requests_total", tenant="hobby", tier="free", outcome="finished") == 1


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic sk-example-acme", "Bearer sk-wrong"])
def test_request_without_a_known_key_gets_401_before_its_body_is_read(serve: Serve, header: str | None) -> None:
    site = serve(config=load_config(EXAMPLE))
    headers = {} if header is None else {"authorization": header}
    for response in (
        site.http.post("/v1/chat/completions", content=b"{", headers=headers),
        site.http.get("/v1/models", headers=headers),
        site.http.get(f"/v1/models/{site.engine.info.model_id}", headers=headers),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "sk-" not in response.text
    assert site.http.get("/health").status_code == 200


def test_official_client_sees_a_wrong_key_as_authentication_error(serve: Serve) -> None:
    with pytest.raises(openai.AuthenticationError):
        serve(config=load_config(EXAMPLE)).client(key="sk-wrong").models.list()


def test_example_file_is_valid() -> None:
    config = load_config(EXAMPLE)
    free = Tier("free", 0, 0.5, 0.5)
    assert config.tenants[1] == Tenant("hobby", free, (bytes.fromhex(digest("sk-example-hobby")),))
    assert config.max_waiting == 256
    assert not config.is_open


def test_no_file_is_an_open_server_with_one_tenant() -> None:
    assert load_config(None) == ServerConfig(tenants=(Tenant("default", Tier("default", 0.0, 1.0, "auto")),))
    assert load_config(None).is_open


def test_file_without_tenants_is_open_with_the_tier_named_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers: {default: {max_budget: 0.5}}")
    assert load_config(path).tenants == (Tenant("default", Tier("default", 0.0, 0.5)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiers: {a: {max_budget: 1.5}}", r"tiers\.a\.max_budget: 1\.5 is not allowed.*or equal to 1"),
        ("tiers: {a: {default_budget: half}}", r"tiers\.a\.default_budget: 'half' is not allowed.*\"auto\""),
        ("tiers: {a: {default_budget: true}}", r"tiers\.a\.default_budget: true is not allowed"),
        ("tiers: {a: {min_budget: .nan}}", r"tiers\.a\.min_budget: nan is not allowed"),
        ("tiers: {a: {max_budget: 0.3, default_budget: 0.5}}", r"tiers\.a: .*min_budget <= default_budget"),
        ("tiers: {a: {max_buget: 1}}", r"tiers\.a\.max_buget: is not a known field"),
        ("tenants: {t: {key_sha256: []}}", r"tenants\.t\.tier: is required"),
        ("max_waiting: 0", r"max_waiting: 0 is not allowed"),
        ("tiers: {a: {}}\ntenants:\n  t: {tier: a, key_sha256: []}", r"3: tenants\.t\.key_sha256: allowed are SHA-256"),
        ("tenants: {t: {tier: a, key_sha256: [k]}}", r"tenants\.t\.key_sha256\.0: allowed are SHA-256"),
        ("tiers:\n  a:\n    weight: 0", r"3: tiers\.a\.weight: 0 is not allowed"),
        ("tiers: {a: {min_budget: 0.5, elastic_floor: 0.25}}", r"tiers\.a: .*min_budget <= elastic_floor"),
        ("tiers: {a: {requests_per_minute: 0}}", r"tiers\.a\.requests_per_minute: 0 is not allowed"),
        ("store: {url: mysql://u:secret@h/d}", r"store\.url: allowed is sqlite:///PATH or postgresql://"),
        ("store: {url: 'sqlite:///b.db', ledger_days: 7}", r"store\.ledger_days: 7 is not allowed.*or equal to 31"),
        ("limits: {url: memcached://h}", r"limits\.url: allowed is memory:// or redis://"),
        (f"tenants: {{t: {{tier: b, key_sha256: [{digest('k')}]}}}}", r"tenants\.t\.tier: 'b' is not a tier"),
        ("- a", r"the file: this value is not allowed: allowed is a mapping like {NAME: VALUE}"),
        ("a: [", "is not YAML: expected the node content, but found '<stream end>'"),
        ("max_waiting: 2026-13-45", "is not YAML: a value is neither the date nor the number that it looks like"),
        ("max_waiting: !!bool maybe", "is not YAML: a value is neither the date nor the number that it looks like"),
        ("max_waiting: '\a'", "is not YAML: special characters are not allowed"),
        ("tiers: {a: {weight: 1, weight: 2}}", "is not YAML: weight is given twice, first in line 1"),
        ("[" * 10_000, "is not allowed: it is nested too deeply"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_by_file_field_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml(:1)?:\s?{message}"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: {a: {tier: t}}\ntiers: {t: {}}\ntenants: {b: {tier: t}}", "3: is not YAML: tenants is given twice"),
        ("tiers: {t: {}}\ntenants:\n  acme: {tier: t}\n  acme: {tier: t}", "4: .*acme is given twice, first in line 3"),
    ],
)  # fmt: skip
def test_field_that_is_given_twice_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml:{message}"):
        load_config(path)


def test_merged_fields_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers:\n  a: &a {weight: 2, priority: 1}\n  default: {<<: *a, weight: 3}")
    (tenant,) = load_config(path).tenants
    assert (tenant.tier.weight, tenant.tier.priority) == (3, 1)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "tenants: {t: {tier: a, key_sha256: [sk-hidden]}}",
        "tenants: {t: {tier: a, key_sha256: sk-hidden}}",
        "tenants: {t: {tier: sk-hidden}}",
        "tenants: {t: sk-hidden}",
        "tenants: {t: {sk-hidden}}",
        "tenants: {t: [sk-hidden]}",
        "tenants: sk-hidden",
        "tenants: {'sk-hidden:': {tier: a}}",
        "store: postgresql://u:hidden@h/d",
        "store: {postgresql://u:hidden@h/d}",
        "store: {url: [postgresql://u:hidden@h/d]}",
        "store: {url: mysql://u:hidden@h/d}",
        "store: {url: 'sqlite:///b.db', journal: [hidden]}",
        "store: {url: 'sqlite:///b.db', when_unreachable: hidden}",
        "limits: redis://:hidden@h",
        "limits: {url: rediss:hidden@h}",
        "limits: {password: hidden}",
        "redis://:hidden@h: 1",
        "sk-hidden",
        "- [{hidden: 1}]",
        # Not YAML.
        'store: {url: "postgresql://u:hidden@h/d}',
        "store: url: postgresql://u:hidden@h/d",
        "store:\n  url: sqlite:///b.db\n postgresql://u:hidden@h/d",
        "store: {url: *hidden}",
        "store: {url: !hidden x}",
        "store: {url: !hid!den x}",
        "store: {url: !!int hidden}",
        "store: {? [hidden] : 1}",
        "&hidden a: &hidden b",
        "limits: %hidden",
        "limits: @hidden",
        "limits: {url: hidden\a}",
        "tenants: {sk-hidden: {tier: a}, sk-hidden: {tier: a}}",
        "store: {postgresql://u:hidden@h/d: 1, postgresql://u:hidden@h/d: 2}",
    ],
)
def test_what_may_be_a_key_or_a_password_is_not_repeated(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"tiers: {{a: {{}}}}\n{text}")
    with pytest.raises(ConfigError, match=r"c\.yaml:\d+: ") as refused:
        load_config(path)
    assert "hid" not in str(refused.value)


def test_passwords_are_in_no_repr(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("store: {url: 'postgresql://u:hidden@h/d'}\nlimits: {url: 'redis://:hidden@h'}")
    assert "hidden" not in repr(load_config(path))


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "50% & more?"
    folder.mkdir()
    path = folder / "c.yaml"
    path.write_text("store: {url: 'sqlite:///data/buddy.db', journal: journals}")
    monkeypatch.chdir(tmp_path)
    for given in (path, path.relative_to(tmp_path)):
        store = load_config(given).store
        assert store is not None
        assert Database(store.url).sqlite_file == folder / "data" / "buddy.db"
        assert store.journal == folder / "journals"


@pytest.mark.parametrize(
    "url", ["sqlite:////var/lib/buddy.db", "sqlite+aiosqlite:////b.db", "sqlite:///:memory:", "postgresql://h/d"]
)
def test_other_stores_are_where_their_url_says(tmp_path: Path, url: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"store: {{url: '{url}', journal: /journals}}")
    assert load_config(path).store == StoreSettings(url, Path("/journals"))


def test_key_of_two_tenants_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    tenant = f"{{tier: a, key_sha256: [{digest('k')}]}}"
    path.write_text(f"tiers: {{a: {{}}}}\ntenants: {{t: {tenant}, u: {tenant}}}")
    with pytest.raises(ConfigError, match="a key of 't' is given again"):
        load_config(path)


def test_prefix_cache_is_on_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("engine: {prefix_cache: false}")
    assert ServerConfig().engine.prefix_cache
    assert not load_config(file).engine.prefix_cache


def test_arithmetic_is_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("engine: {arithmetic: fma}")
    assert ServerConfig().engine.arithmetic == "auto"
    assert load_config(file).engine.arithmetic == "fma"
