"""Whatever goes wrong, the answer has one shape; and the headers every answer has."""

from typing import Any

import httpx
import openai
import pytest

from buddy_server.config import ServerConfig
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site


def checked_error(response: httpx.Response) -> dict[str, Any]:
    """The error in `response`, whose shape must be OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": \xff}', b"[]", b"null", b'"\\ud800"', b"[" * 100_000])
def test_body_that_is_no_json_object_gets_400(site: Site, body: bytes) -> None:
    response = site.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert checked_error(response)["type"] == "invalid_request_error"


def test_unknown_route_gets_404_and_wrong_method_405(site: Site) -> None:
    for path in ("/nowhere", "/v1/chat/completions/", "/redoc", "/admin/tenants"):
        response = site.http.get(path)
        assert (response.status_code, checked_error(response)["code"]) == (404, "route_not_found")
    response = site.http.get("/v1/chat/completions")
    assert (response.status_code, checked_error(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_unknown_model_gets_404_that_names_the_one_there_is(site: Site) -> None:
    response = site.chat(model="gpt-5")
    error = checked_error(response)
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert INFO.model_id in error["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_body_over_the_limit_gets_413(serve: Serve, announced: bool) -> None:
    site = serve(config=ServerConfig(max_body_bytes=1000))
    body = b" " * 200_000
    content = body if announced else iter([body[:600], body[600:]])
    response = site.http.post("/v1/chat/completions", content=content)
    assert (response.status_code, checked_error(response)["code"]) == (413, "request_too_large")
    assert site.chat().status_code == 200


def test_unforeseen_exception_gets_500_without_a_trace(serve: Serve) -> None:
    class BrokenEngine(FakeEngine):
        @property
        def is_ready(self) -> bool:
            raise ZeroDivisionError("secret inside of the engine")

        @is_ready.setter
        def is_ready(self, value: bool) -> None:
            pass

    response = serve(BrokenEngine()).chat()
    assert (response.status_code, checked_error(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_official_client_tells_the_errors_apart(site: Site) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        site.client().chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        site.client().chat.completions.create(
            model=INFO.model_id, messages=[{"role": "user", "content": "hi"}], extra_body={"budget": 2}
        )
    assert (refused.value.code, refused.value.param) == ("invalid_budget", "budget")


@pytest.mark.parametrize(
    ("given", "returned"), [("abc-1_2.3", "abc-1_2.3"), ("a b/<c>", "abc"), ("x" * 300, "x" * 128)]
)
def test_request_id_of_the_client_comes_back_cleaned(site: Site, given: str, returned: str) -> None:
    response = site.chat({"x-request-id": given})
    assert response.headers["x-request-id"] == returned
    assert int(response.headers["openai-processing-ms"]) >= 0


def test_request_without_an_id_is_given_one_of_its_own(site: Site) -> None:
    ids = {site.http.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
