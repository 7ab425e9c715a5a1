"""The pages that tell what becomes of other servers' fields: api-fields.md and moving.md are true."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import openai_fields
from buddy_server.api.unsupported_fields import UNSUPPORTED_FIELDS
from fakes.engine import INFO
from fakes.site import Site

MOVING = (Path(__file__).parents[2] / "server" / "moving.md").read_text(encoding="utf-8")
MESSAGES = [{"role": "user", "content": "hi you"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": INFO.model_id, "messages": MESSAGES},
    "/v1/completions": {"model": INFO.model_id, "prompt": "hi you"},
    "/v1/responses": {"model": INFO.model_id, "input": "hi you"},
    "/tokenize": {"prompt": "hi you"},
}


def told(site: Site, path: str, fields: dict[str, Any]) -> tuple[int, str | None, Any]:
    """Status and param of a request with `fields`, and all that they could change: what the engine was asked, and what
    the answer says."""
    site.engine.requests.clear()
    body = BODIES[path] | fields
    if path == "/tokenize" and "add_generation_prompt" in fields:
        body = {"messages": MESSAGES} | fields
    response = site.http.post(path, json=body)
    answer = response.json()
    if response.status_code != 200:
        return response.status_code, answer["error"]["param"], answer["error"]["code"]
    asked = [dataclasses.replace(request, request_id="") for request in site.engine.requests]
    kept = {key: value for key, value in answer.items() if key not in ("id", "created", "created_at", "output")}
    return 200, None, (asked, kept)


def moving_rows() -> list[tuple[str, str, str]]:
    """Fields as JSON, what happens to them, and the path: of each row of each table."""
    rows = []
    for field, here, notes in re.findall(r"^\| `(.*?)` \| (\w+) \| (.*)\|$", MOVING, re.MULTILINE):
        only = re.match("`(/[a-z0-9/]+)`", notes)
        rows += [(field, here, path) for path in ([only[1]] if only else ("/v1/chat/completions", "/v1/completions"))]
    return rows


@pytest.mark.parametrize(("field", "here", "path"), moving_rows())
def test_page_on_moving_tells_what_happens(site: Site, field: str, here: str, path: str) -> None:
    fields = json.loads("{" + field + "}")
    without, with_field = told(site, path, {}), told(site, path, fields)
    if here == "refused":
        status, param, _ = with_field
        assert (status, param) == (400, next(iter(fields)))
    else:
        assert with_field[0] == 200
        assert (with_field == without) == (here == "ignored")


def test_page_on_moving_has_every_field_that_some_endpoint_refuses_and_is_not_openais() -> None:
    openais = set().union(*map(openai_fields.published_fields, openai_fields.REQUESTS))
    listed = {next(iter(json.loads("{" + field + "}"))) for field, _, _ in moving_rows()}
    assert UNSUPPORTED_FIELDS.keys() - openais - listed == set()


def test_table_of_openais_fields_is_up_to_date() -> None:
    assert openai_fields.TABLE.read_text(encoding="utf-8") == openai_fields.table(), "run tests/openai_fields.py"


@pytest.mark.parametrize("path", openai_fields.REQUESTS)
def test_fields_of_openai_do_what_the_table_tells(site: Site, path: str) -> None:
    without = told(site, path, {})
    rows = {field: here for field, here, _ in openai_fields.request_rows(path, openai_fields.our_document())}
    for field, here in rows.items():
        if here == "ignored":
            assert told(site, path, {field: openai_fields.IGNORED[field][0]}) == without, field
        elif here.startswith("refused"):
            value = [{"type": "unheard of"}] if field == "tools" else {"type": "unheard of"}
            assert told(site, path, {field: value})[::2] == (400, "unsupported_parameter"), field
    assert {"budget", "buddy", "top_k"} <= rows.keys()
