"""The small endpoints."""

from openai.types import Model

from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site


def test_model_is_found_by_its_id_with_a_slash(site: Site) -> None:
    Model.model_validate(site.http.get(f"/v1/models/{INFO.model_id}").json(), strict=True)
    model = site.client().models.retrieve(INFO.model_id)
    assert model.owned_by == "buddy-serve"
    assert model.model_extra == {"max_model_len": min(INFO.max_context, INFO.kv_capacity_tokens)}
    response = site.http.get("/v1/models/other/model")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_ready_follows_the_engine_and_health_does_not(serve: Serve) -> None:
    site = serve(FakeEngine(is_ready=False))
    assert site.http.get("/health").status_code == 200
    assert site.http.get("/ready").status_code == 503
    site.engine.is_ready = True
    assert site.http.get("/ready").json() == {"status": "ready"}


def test_version_is_a_text(site: Site) -> None:
    assert isinstance(site.http.get("/version").json()["version"], str)


def test_metrics_are_scraped_as_text(site: Site) -> None:
    site.engine.num_waiting = 3
    response = site.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "buddy_engine_up 1.0\n" in response.text
    assert "buddy_num_requests_waiting 3.0\n" in response.text
    assert 'model="tiny/fake-8l"' in response.text
