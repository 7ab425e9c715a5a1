"""How deep a request runs: what it may ask for, and what it gets."""

import pytest

from buddy_routing.action_space import ActionSpace
from buddy_server.config import ServerConfig
from buddy_server.errors import ConfigError
from buddy_server.tenancy.depth import check_tier, decide_depth, parse_budget
from buddy_server.tenancy.policy import Tenant, Tier
from fakes.engine import PREDICTING, FakeEngine
from fakes.site import Serve, Site

HALF = ServerConfig((Tenant("default", Tier("half", min_budget=0.4, max_budget=0.5, default_budget="auto")),))

EIGHT, SIX = ActionSpace.skip_or_run(8), ActionSpace.skip_or_run(6)


def test_half_the_budget_runs_half_the_layers_of_every_token(site: Site) -> None:
    buddy = site.chat(budget=0.5).json()["buddy"]
    assert buddy == {
        "budget_requested": 0.5,
        "budget_granted": 0.5,
        "decided_by": "request",
        "layers": 8,
        "layers_per_token": 4.0,
        "layer_tokens": (4 + 6 - 1) * 4 / 8,  # the last token is generated, not run
        "distinct_paths": 6,
    }
    assert site.engine.requests[0].max_cost == 4000


def test_trace_gives_the_layers_of_every_token(site: Site) -> None:
    paths = site.chat(budget=0.25, buddy={"trace": True}).json()["buddy"]["paths"]
    assert paths == [[0, 7]] * 6
    per_choice = site.chat(budget=0.25, n=2, buddy={"trace": True}).json()["buddy"]["paths"]
    assert per_choice == [[[0, 7]] * 6] * 2


def test_official_client_sends_the_budget_as_an_extra_field(site: Site) -> None:
    completion = site.client().chat.completions.create(
        model=site.engine.info.model_id,
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"budget": 0.75},
    )
    assert completion.model_extra is not None
    assert completion.model_extra["buddy"]["layers_per_token"] == 6.0


def test_header_does_the_same_and_the_body_wins(site: Site) -> None:
    assert site.chat({"x-buddy-budget": "0.5"}).json()["buddy"]["budget_requested"] == 0.5
    assert site.chat({"x-buddy-budget": "auto"}).json()["buddy"]["budget_requested"] == "auto"
    assert site.chat({"x-buddy-budget": "0.5"}, budget=1).json()["buddy"]["budget_requested"] == 1.0
    assert site.chat({"x-buddy-budget": "0.5"}, budget=None).json()["buddy"]["budget_requested"] == 0.5


@pytest.mark.parametrize("budget", [0.2, 0, -1, 1.01, 10**400, 1e300, True, "0.5", "AUTO", "", [], {}])
def test_budget_out_of_range_is_refused_with_value_and_range(site: Site, budget: object) -> None:
    response = site.chat(budget=budget)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_budget", "budget")
    assert "0.25" in error["message"]
    assert ("true" if budget is True else repr(budget)[:20]) in error["message"]


@pytest.mark.parametrize("header", ["nan", "inf", "0.1", "much", "", "true"])
def test_budget_header_out_of_range_is_refused(site: Site, header: str) -> None:
    response = site.chat({"x-buddy-budget": header})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_budget")


@pytest.mark.parametrize(
    ("asked", "granted", "decided_by", "clamped"),
    [
        (0.45, 0.45, "request", None),
        (1.0, 0.5, "tenant", "tier_max"),
        (0.25, 0.4, "tenant", "tier_min"),
        ("auto", 0.5, "tenant", None),
        (None, 0.5, "tenant", None),
    ],
)
def test_request_asks_and_tier_clamps(
    serve: Serve, asked: object, granted: float, decided_by: str, clamped: str
) -> None:
    site = serve(config=HALF)
    buddy = site.chat(budget=asked).json()["buddy"]
    assert (buddy["budget_requested"], buddy["budget_granted"]) == (asked, granted)
    assert buddy["decided_by"] == decided_by
    for reason in ("tier_min", "tier_max"):
        assert site.sample("buddy_budget_clamped_total", reason=reason) == (reason == clamped)


@pytest.mark.parametrize(("wanted", "num_run"), [(7, 4), (4, 4), (2, 3)])
@pytest.mark.parametrize("asked", ["auto", None])
def test_open_budget_is_the_predictors_within_the_tier(serve: Serve, asked: object, wanted: int, num_run: int) -> None:
    site = serve(FakeEngine(PREDICTING, predicted=wanted), HALF)
    buddy = site.chat(budget=asked).json()["buddy"]
    assert (buddy["budget_granted"], buddy["decided_by"]) == (num_run / 8, "predictor")
    assert buddy["layers_per_token"] == num_run
    request = site.engine.requests[0]
    assert (request.min_cost, request.max_cost) == (3000, 4000)
    assert (site.sample("buddy_budget_granted_count"), site.sample("buddy_budget_granted_sum")) == (1, num_run / 8)


def test_predictor_is_not_asked_when_the_request_says_its_budget(serve: Serve) -> None:
    site = serve(FakeEngine(PREDICTING, predicted=3))
    assert site.chat(budget=0.75).json()["buddy"]["decided_by"] == "request"
    assert site.engine.requests[0].max_cost == 6000


def test_default_budget_of_the_tier_counts_when_none_is_asked() -> None:
    decision = decide_depth(None, Tier("t", default_budget=0.75), EIGHT, has_predictor=True)
    assert (decision.granted, decision.max_cost, decision.min_cost, decision.decided_by) == (0.75, 6000, None, "tenant")


def test_open_budget_of_exits_lies_between_those_that_the_tier_pays_for() -> None:
    exits = ActionSpace.of_exits(8, (3, 5))
    decision = decide_depth("auto", Tier("t", min_budget=0.3, max_budget=0.8), exits, has_predictor=True)
    assert (decision.min_cost, decision.max_cost) == (4000, 6000)


def test_smallest_budget_is_granted_as_asked() -> None:
    decision = decide_depth(parse_budget(2 / 6, SIX), Tier("t"), SIX, has_predictor=True)
    assert (decision.granted, decision.max_cost, decision.clamped) == (2 / 6, 2000, None)


def test_tier_that_cannot_pay_for_the_first_and_last_layer_is_refused_at_start(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.t\.max_budget: 0\.2 is too small.*0\.25"):
        check_tier(Tier("t", max_budget=0.2, default_budget="auto"), EIGHT)
    with pytest.raises(ConfigError):
        serve(FakeEngine(), ServerConfig((Tenant("default", Tier("t", default_budget=0.1)),)))


ELASTIC = Tier("free", weight=2.0, priority=-1, elastic_floor=0.25)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("engine", [FakeEngine(), FakeEngine(PREDICTING, predicted=7)])
def test_budget_that_the_engine_lowers_under_load_is_told(serve: Serve, engine: FakeEngine, n: int) -> None:
    site = serve(engine, ServerConfig(tenants=(Tenant("default", ELASTIC),)))
    for limit, granted, decided_by in ((8000, 0.75, "request"), (3000, 0.375, "elastic")):
        engine.limit_depth({"free": limit, "other": 2000})
        buddy = site.chat(budget=0.75, n=n).json()["buddy"]
        assert (buddy["budget_requested"], buddy["budget_granted"], buddy["decided_by"]) == (0.75, granted, decided_by)
    buddy = site.chat(n=n).json()["buddy"]
    assert (buddy["budget_granted"], buddy["decided_by"]) == (0.375, "elastic")
    engine.limit_depth({})


def test_tier_states_the_share_of_its_requests_and_whether_they_are_elastic(serve: Serve) -> None:
    site = serve(config=ServerConfig(tenants=(Tenant("default", ELASTIC),)))
    site.chat()
    request = site.engine.requests[0]
    assert (request.weight, request.priority, request.tier) == (2.0, -1, "free")
    site = serve(config=ServerConfig(tenants=(Tenant("default", Tier("firm")),)))
    site.chat()
    assert site.engine.requests[0].tier is None


def test_header_that_says_no_budget_is_refused_even_beside_the_field(site: Site) -> None:
    response = site.chat({"x-buddy-budget": "much"}, budget=0.5)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_budget")
