"""How our OpenAPI document differs from OpenAI's published fields, as the installed `openai` package has them.

`PYTHONPATH=tests python tests/openai_fields.py` writes server/api-fields.md.
"""

import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openai.types import Completion
from openai.types import completion_create_params as plain
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat
from openai.types.responses import Response
from openai.types.responses import response_create_params as responses
from pydantic import BaseModel

from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from fakes.engine import FakeEngine
from fakes.streaming_server import NoTokenizer
from fakes.tenancy import tenancy_of

TABLE = Path(__file__).parents[1] / "server" / "api-fields.md"

REQUESTS: Mapping[str, tuple[str, type]] = {
    "/v1/chat/completions": ("ChatRequest", chat.CompletionCreateParamsStreaming),
    "/v1/completions": ("CompletionRequest", plain.CompletionCreateParamsStreaming),
    "/v1/responses": ("ResponsesRequest", responses.ResponseCreateParamsStreaming),
}
ANSWERS: Mapping[str, type[BaseModel]] = {
    "ChatCompletion": ChatCompletion,
    "ChatCompletionChunk": ChatCompletionChunk,
    "Completion": Completion,
    "ResponseView": Response,
}

_NO_STORE = "nothing is stored"
_NO_REASONING = "a wish about how to think or write, which a model that knows none of it cannot follow"
_SCHEDULING = "how and when OpenAI runs a request"
_USER = "whose request it is, for checks of OpenAI's own"
IGNORED: Mapping[str, tuple[object, str]] = {
    "access_programs": ([], _USER),
    "background_options": ({}, _SCHEDULING),
    "context_management": ([], "input that does not fit is refused"),
    "image": ({}, "the output is text"),
    "max_tool_calls": (3, "counts built-in tools, of which there are none"),
    "metadata": ({"a": "b"}, _NO_STORE),
    "prediction": ({"type": "content", "content": "hi"}, "makes answers faster, not different"),
    "prompt_cache_key": ("a", "prompts are cached by their tokens"),
    "prompt_cache_options": ({}, "prompts are cached by their tokens"),
    "prompt_cache_retention": ("24h", "prompts are cached while there is room"),
    "reasoning": ({"effort": "low"}, _NO_REASONING),
    "reasoning_effort": ("low", _NO_REASONING),
    "safety_identifier": ("a", _USER),
    "service_tier": ("auto", _SCHEDULING),
    "store": (True, _NO_STORE),
    "stream_options": ({"include_obfuscation": True}, "events are not padded"),
    "truncation": ("auto", "input that does not fit is refused"),
    "user": ("a", _USER),
    "verbosity": ("low", _NO_REASONING),
}
"""Fields of OpenAI that are accepted and change nothing: an example, and why it may be ignored."""


def our_document() -> dict[str, Any]:
    engine, config = FakeEngine(), ServerConfig()
    metrics = Metrics(engine.info, config.tenants)
    return create_app(config, engine, NoTokenizer(), metrics, tenancy_of(engine, config, metrics)).openapi()


def published_fields(path: str) -> set[str]:
    """The fields of OpenAI's request to `path`."""
    return set(typing.get_type_hints(REQUESTS[path][1]))


def request_rows(path: str, document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, treatment and reason for every field of OpenAI's request that is not simply honoured, and for every one of
    ours that OpenAI does not have."""
    ours = document["components"]["schemas"][REQUESTS[path][0]]["properties"]
    theirs = published_fields(path)
    for field in sorted(theirs):
        if field not in ours:
            yield field, "ignored", IGNORED[field][1]
        elif "x-refused" in ours[field]:
            harmless = [json.dumps(value) for value in ours[field]["enum"][1:]]
            allowed = f" (except `{'` or `'.join(harmless)}`)" if harmless else ""
            yield field, f"refused{allowed}", ours[field]["description"].removeprefix("Not supported: ")
    for field in sorted(ours.keys() - theirs):
        if "x-refused" not in ours[field]:
            yield field, "ours", ours[field].get("description", "as in chat completions").replace("\n", " ")


def answer_rows(name: str, document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every field that only OpenAI's answer has, or only ours."""
    yield from _differences(name, ANSWERS[name], document["components"]["schemas"][name], document)


def _differences(
    path: str, published: type[BaseModel], schema: dict[str, Any], document: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    ours = schema.get("properties", {})
    for field in sorted(published.model_fields.keys() | ours.keys()):
        where = f"{path}.{field}"
        if field not in ours:
            yield where, "absent"
        elif field not in published.model_fields:
            yield where, "ours"
        else:
            inner = list(_models(published.model_fields[field].annotation))
            schemas = [each for each in _objects(ours[field], document) if each.get("properties")]
            if len(inner) == 1 == len(schemas):
                yield from _differences(where, inner[0], schemas[0], document)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
    else:
        for inner in typing.get_args(annotation):
            yield from _models(inner)


def _objects(schema: dict[str, Any], document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in schema:
        yield document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from _objects(inner, document)


def table() -> str:
    """The page, in Markdown."""
    document = our_document()
    lines = [
        "# Fields that differ from OpenAI's",
        "",
        "`tests/openai_fields.py` writes this page from /openapi.json and the types of the `openai` package; a test",
        "keeps it true. Fields of OpenAI that are not listed are honoured. *Ignored* fields are accepted and change",
        "nothing. A *refused* field gets a 400 `unsupported_parameter` that names it, unless it is null or has the",
        "value shown.",
        "",
        "## Requests",
    ]
    for path in REQUESTS:
        lines += ["", f"### {path}", "", "| field | here | why |", "|---|---|---|"]
        lines += [f"| `{field}` | {treatment} | {why} |" for field, treatment, why in request_rows(path, document)]
    lines += ["", "## Responses", "", "Absent fields are optional in OpenAI's types.", ""]
    lines += ["| field | here |", "|---|---|"]
    lines += [f"| `{field}` | {what} |" for name in ANSWERS for field, what in answer_rows(name, document)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
