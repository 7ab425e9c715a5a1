"""The pages for people: what this server is, and its API. They need neither scripts nor other hosts."""

import json
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from buddy_server.api.openapi import REFUSED

_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_PLAIN, _CODE = Markup("{}"), Markup("<code>{}</code>")
_BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
}


def add_pages(app: FastAPI, model_id: str) -> None:
    """GET / and GET /docs, which shows the OpenAPI document of `app`."""
    templates = Environment(loader=PackageLoader("buddy_server.api"), autoescape=True, undefined=StrictUndefined)
    templates.filters |= {
        "prose": _prose,
        "type": _type,
        "supported": partial(_fields, False),
        "refused": partial(_fields, True),
    }

    @app.get("/", include_in_schema=False)
    async def start_page(request: Request) -> HTMLResponse:
        page = templates.get_template("start.html").render(
            model_id=model_id, version=app.version, url=str(request.base_url)
        )
        return HTMLResponse(page, headers=_HEADERS)

    @cache
    def documentation() -> str:
        document = app.openapi()
        return templates.get_template("docs.html").render(
            title=f"{app.title} {app.version}",
            description=app.description,
            operations=list(_operations(document)),
            schemas=document["components"]["schemas"],
        )

    # Rendered once: it takes tens of milliseconds, for which all streams would wait.
    @app.get("/docs", include_in_schema=False)
    async def documentation_page() -> HTMLResponse:
        return HTMLResponse(documentation(), headers=_HEADERS)


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield {"method": method.upper(), "path": path, **operation}


def _fields(refused: bool, fields: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, field) for name, field in fields.items() if field.get(REFUSED, False) is refused]


def _prose(text: str) -> Markup:
    """The only Markdown in descriptions is code."""
    pieces = ((_CODE if index % 2 else _PLAIN).format(piece) for index, piece in enumerate(text.split("`")))
    return Markup("").join(pieces)


def _type(schema: dict[str, Any]) -> Markup:
    """A JSON schema in a few words, with links to those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "contentSchema" in schema:
        return _type(schema["contentSchema"])
    if "anyOf" in schema:
        return Markup(" or ").join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        values: Iterable[object] = schema["enum"] if "enum" in schema else [schema["const"]]
        return Markup(" or ").join(_CODE.format(json.dumps(value)) for value in values)
    kind = schema.get("type", "anything")
    words = Markup("list of {}").format(_type(schema["items"])) if kind == "array" else _PLAIN.format(kind)
    bounds = ", ".join(told.format(schema[bound]) for bound, told in _BOUNDS.items() if bound in schema)
    return words + (Markup(" ({})").format(bounds) if bounds else "")
