"""Who may ask: keys, and the file they come from."""

import hashlib
from pathlib import Path

import openai
import pytest

from buddy_server.config import ServerConfig, load_config
from buddy_server.errors import ConfigError
from buddy_server.tenancy.policy import Tenant, Tier
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
        ("tiers: {a: {default_budget: true}}", r"tiers\.a\.default_budget: True is not allowed"),
        ("tiers: {a: {min_budget: .nan}}", r"tiers\.a\.min_budget: nan is not allowed"),
        ("tiers: {a: {max_budget: 0.3, default_budget: 0.5}}", r"tiers\.a: .*min_budget <= default_budget"),
        ("tiers: {a: {max_buget: 1}}", r"tiers\.a\.max_buget: is not a known field"),
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
        ("- a", r"the file: \['a'\] is not allowed"),
        ("a: [", "is not YAML"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_by_file_field_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml(:1)?:\s?{message}"):
        load_config(path)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_config(tmp_path / "gone.yaml")


def test_plain_key_in_the_file_is_refused_without_repeating_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers: {a: {}}\ntenants: {t: {tier: a, key_sha256: [sk-plain]}}")
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert "sk-plain" not in str(refused.value)


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
