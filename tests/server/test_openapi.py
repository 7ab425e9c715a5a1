"""The OpenAPI document and the pages for people: complete, true, and without other hosts."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest

from buddy_server.config import ServerConfig
from buddy_server.tenancy.policy import Tenant, Tier
from fakes.engine import INFO, FakeEngine
from fakes.site import Serve, Site

PROMPTS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
}
KEYED = ServerConfig(tenants=(Tenant("acme", Tier("free"), (bytes(32),)),))


def document_of(site: Site) -> dict[str, Any]:
    document: dict[str, Any] = site.http.get("/openapi.json").json()
    return document


def closed(schema: Any) -> Any:
    """`schema`, which then allows no properties but those it names."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    extra = {"additionalProperties": False} if "properties" in schema else {}
    return extra | {key: closed(value) for key, value in schema.items()}


def check(document: dict[str, Any], name: str, value: object) -> None:
    """That the named schema describes `value`, and every property in it."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": closed(document["components"])}
    jsonschema_rs.Draft202012Validator(schema).validate(value)


def test_every_route_is_in_the_document_and_every_reference_has_its_target(site: Site) -> None:
    document = document_of(site)
    assert set(document["paths"]) == {
        "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/{asked}", "/v1/chat/completions",
        "/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
    }  # fmt: skip
    references = set(re.findall(r'"#/components/(\w+)/([\w-]+)"', json.dumps(document)))
    assert {kind for kind, _ in references} == {"schemas", "headers"}
    for kind, name in references:
        assert name in document["components"][kind]


@pytest.mark.parametrize(
    ("path", "name", "fields"),
    [
        ("/v1/chat/completions", "ChatCompletion", {}),
        ("/v1/chat/completions", "ChatCompletion", {"logprobs": True, "top_logprobs": 2, "n": 2}),
        ("/v1/chat/completions", "ChatCompletion", {"buddy": {"trace": True}}),
        ("/v1/chat/completions", "ChatCompletion", {"buddy": {"trace": True}, "n": 2, "budget": "auto"}),
        ("/v1/completions", "Completion", {"echo": True, "logprobs": 2}),
        ("/v1/completions", "Completion", {"budget": 0.5}),
        ("/v1/chat/completions", "ErrorView", {"budget": 7}),
        ("/v1/responses", "ResponseView", {"max_output_tokens": 3}),
        ("/v1/responses", "ResponseView", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        ("/tokenize", "Tokens", {"return_token_strs": True}),
        ("/tokenize", "Tokens", {}),
    ],
)
def test_answers_are_as_documented(site: Site, path: str, name: str, fields: dict[str, object]) -> None:
    response = site.http.post(path, json={"model": INFO.model_id} | PROMPTS[path] | fields)
    document = document_of(site)
    documented = document["paths"][path]["post"]["responses"][str(response.status_code)]
    assert documented["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
    check(document, name, response.json())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}, "logprobs": True}),
        ("/v1/completions", {"buddy": {"trace": True}}),
        ("/v1/completions", {"stream_options": {"include_usage": True}, "logprobs": 1}),
        ("/v1/responses", {}),
        ("/v1/responses", {"include": ["message.output_text.logprobs"], "max_output_tokens": 2}),
    ],
)
def test_chunks_are_as_documented(site: Site, path: str, fields: dict[str, object]) -> None:
    response = site.http.post(path, json={"model": INFO.model_id, "stream": True} | PROMPTS[path] | fields)
    document = document_of(site)
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    data = content["schema"]["properties"]["data"]
    chunk = data.get("anyOf", [data])[0]["contentSchema"]["anyOf"][0]
    events = re.findall("^data: (.*)$", response.text, re.MULTILINE)
    assert (events[-1] == "[DONE]") == ({"const": "[DONE]"} in data.get("anyOf", ()))
    assert len(events) > 3
    for event in events:
        if event != "[DONE]":
            check(document, chunk["$ref"].rsplit("/", 1)[-1], json.loads(event))


def test_budget_has_the_bounds_of_the_model(site: Site) -> None:
    document = document_of(site)
    budget = {"$ref": "#/components/schemas/Budget"}
    schemas = document["components"]["schemas"]
    assert schemas["Budget"]["anyOf"] == [{"type": "number", "minimum": 0.25, "maximum": 1}, {"const": "auto"}]
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        assert schemas[name]["properties"]["budget"]["anyOf"] == [budget, {"type": "null"}]
    (header,) = document["paths"]["/v1/chat/completions"]["post"]["parameters"]
    assert (header["name"], header["in"], header["schema"]) == ("x-buddy-budget", "header", budget)


def test_statuses_are_those_of_the_errors(site: Site) -> None:
    paths = document_of(site)["paths"]
    completion = {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503"}
    assert set(paths["/v1/chat/completions"]["post"]["responses"]) == completion
    assert set(paths["/v1/completions"]["post"]["responses"]) == completion
    assert set(paths["/v1/responses"]["post"]["responses"]) == completion
    assert set(paths["/tokenize"]["post"]["responses"]) == completion - {"429", "503"}
    assert set(paths["/v1/models/{asked}"]["get"]["responses"]) == {"200", "401", "403", "404", "500"}
    assert set(paths["/ready"]["get"]["responses"]) == {"200", "503"}
    bad = paths["/v1/chat/completions"]["post"]["responses"]["400"]["description"]
    assert "invalid_budget" in bad
    assert "context_length_exceeded" in bad
    limited = paths["/v1/chat/completions"]["post"]["responses"]["429"]["headers"]
    assert {"retry-after", "x-ratelimit-remaining-tokens", "x-request-id"} <= set(limited)


def test_key_is_optional_where_none_is_needed(serve: Serve) -> None:
    for config, expected in ((ServerConfig(), [{}, {"api-key": []}]), (KEYED, [{"api-key": []}])):
        document = document_of(serve(config=config))
        for path in (*PROMPTS, "/detokenize"):
            assert document["paths"][path]["post"]["security"] == expected
        assert "security" not in document["paths"]["/health"]["get"]
        assert document["components"]["securitySchemes"]["api-key"] == {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_name_no_other_host_and_run_no_script(serve: Serve, path: str) -> None:
    site = serve(config=KEYED)
    page = site.http.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text
    assert set(re.findall("https?://[^/\"']*", page.text)) <= {site.url}


def test_start_page_has_a_command_that_works(site: Site) -> None:
    page = site.http.get("/").text
    assert INFO.model_id in page
    address = re.search(r"curl -N (\S+)", page)
    body = re.search(r"-d &#39;({.*})&#39;|-d '({.*})'", page, re.DOTALL)
    assert address is not None
    assert body is not None
    assert "[DONE]" in site.http.post(address[1], content=body[2] or body[1]).text


def test_links_of_the_pages_lead_somewhere(site: Site) -> None:
    for path in ("/", "/docs"):
        page = site.http.get(path).text
        for link in re.findall('href="([^"]*)"', page):
            if link.startswith("#"):
                assert f'id="{link[1:]}"' in page
            else:
                assert site.http.get(link).status_code == 200


def test_documentation_page_shows_operations_fields_and_bounds(serve: Serve) -> None:
    page = serve(FakeEngine()).http.get("/docs").text
    assert "POST /v1/chat/completions" in page
    for told in (
        "number (from 0.25, to 1) or <code>&#34;auto&#34;</code>",
        'list of <a href="#ChatMessage">ChatMessage</a>',
    ):
        assert told in page
    assert "repetition_penalty" in page.split("Fields that are refused")[1]
