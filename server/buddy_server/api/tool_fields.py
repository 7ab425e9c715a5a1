"""The fields of a request about tools."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator

from buddy_server.api.field_types import refused
from buddy_server.api.json_bound import JsonBound
from buddy_server.api.response_format import MAX_SCHEMA_BYTES
from buddy_server.api.schema import Schema
from buddy_server.errors import InvalidRequest, shown
from buddy_server.tools.choice import MAX_CALLS, Function, ToolChoice

MAX_TOOLS = 128
MAX_SCHEMAS_BYTES = 2**18
"""Of all tools of a request together."""


class FunctionDefinition(Schema):
    """`parameters` is the JSON schema of the arguments, None for a function without any."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


class Tool(Schema):
    type: Literal["function"]
    function: FunctionDefinition


class FlatTool(FunctionDefinition):
    """A tool of /v1/responses."""

    type: Literal["function"]


@dataclass(frozen=True, slots=True)
class WantedCalls:
    """The field tool_choice. `names` are the functions that it names, None for all; `only_one` call may be made."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    only_one: bool = False

    def flat(self) -> str | dict[str, Any]:
        """The same in the notation of /v1/responses."""
        if self.names is None:
            return self.mode
        tools = [{"type": "function", "name": name} for name in self.names]
        return tools[0] if self.only_one else {"type": "allowed_tools", "mode": self.mode, "tools": tools}


def _wanted_calls(value: object) -> WantedCalls:
    """Reads both notations, that of chat and the flat one of /v1/responses."""
    match value:
        case "none" | "auto" | "required":
            return WantedCalls(value)
        case {"type": "function"}:
            if (name := _name(value)) is not None:
                return WantedCalls("required", (name,), only_one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}} | {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": [*tools],
        }:
            names = tuple(name for tool in tools if (name := _name(tool)) is not None)
            if names and len(names) == len(tools):
                return WantedCalls(mode, names)
    raise refused(
        "tool_choice",
        value,
        '"none", "auto", "required", {"type": "function", "function": {"name": ...}}, or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
    )


def _name(tool: object) -> str | None:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    return None


_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["function", "allowed_tools"]}}},
    ]
}


class ToolChoiceFields(Schema):
    """The fields that choose among tools."""

    tool_choice: Annotated[WantedCalls, PlainValidator(_wanted_calls), WithJsonSchema(_CHOICE)] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def functions(self) -> Sequence[FunctionDefinition]:
        return ()

    @property
    def functions_field(self) -> str:
        """The field of a function, with {} for its number."""
        return "tools[{}]"

    @model_validator(mode="after")
    def _possible_calls(self) -> Self:
        names: set[str] = set()
        for index, function in enumerate(self.functions):
            if function.name in names:
                field = f"{self.functions_field.format(index)}.name"
                raise refused(field, function.name, "a name that no other tool has")
            names.add(function.name)
        _check_schemas(self.functions, self.functions_field)
        self.chosen_tools()
        return self

    def chosen_tools(self) -> ToolChoice | None:
        """The calls that an answer may consist of; None if there can be none.

        Raises InvalidRequest for a choice that these functions do not allow.
        """
        wanted = self.tool_choice or WantedCalls("auto")
        functions = [
            Function(one.name, one.parameters, bool(one.strict), f"{self.functions_field.format(index)}.parameters")
            for index, one in enumerate(self.functions)
        ]
        if wanted.mode == "none" or (wanted.mode == "auto" and not functions):
            return None
        if not functions:
            raise InvalidRequest("tool_choice: it asks for a call, but there are no tools", param="tool_choice")
        known = {function.name for function in functions}
        for name in wanted.names or ():
            if name not in known:
                raise refused("tool_choice", name, f"names of the tools: {shown(sorted(known))}")
        allowed = tuple(function for function in functions if wanted.names is None or function.name in wanted.names)
        must_call = wanted.mode == "required"
        only_one = wanted.only_one or self.parallel_tool_calls is False
        is_enforced = must_call or only_one or len(allowed) < len(functions) or any(one.is_strict for one in allowed)
        return ToolChoice(allowed, must_call, 1 if only_one else MAX_CALLS, is_enforced)

    def tools_for_template(self) -> list[dict[str, Any]]:
        """The tools that the model is told of: all, whichever of them may be called, or none if it may call none."""
        return [] if self.chosen_tools() is None else [function.for_template() for function in self.functions]


class ToolFields(ToolChoiceFields):
    """The fields of a chat."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    @property
    def functions(self) -> Sequence[FunctionDefinition]:
        return [tool.function for tool in self.tools or ()]

    @property
    def functions_field(self) -> str:
        return "tools[{}].function"


class FlatToolFields(ToolChoiceFields):
    """The fields of /v1/responses."""

    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    @property
    def functions(self) -> Sequence[FunctionDefinition]:
        return self.tools or ()


def _check_schemas(functions: Sequence[FunctionDefinition], place: str) -> None:
    """Raise InvalidRequest if the parameters of a function are no schema of an object or too large."""
    num_bytes = 0
    bound = JsonBound()
    for index, function in enumerate(functions):
        if function.parameters is None:
            continue
        field = f"{place.format(index)}.parameters"
        kind = function.parameters.get("type", "object")
        if kind != "object":
            raise refused(f"{field}.type", kind, '"object", since arguments have names')
        try:
            written = json.dumps(function.parameters, allow_nan=False).encode()
        except ValueError:
            raise InvalidRequest(f"{field}: there is a number in it that JSON does not have", param=field) from None
        bound.add(written, field)
        num_bytes += len(written)
        if len(written) > MAX_SCHEMA_BYTES or num_bytes > MAX_SCHEMAS_BYTES:
            raise InvalidRequest(
                f"{field}: the schema has {len(written)} bytes of JSON, with those before it {num_bytes}; allowed are "
                f"{MAX_SCHEMA_BYTES} in one and {MAX_SCHEMAS_BYTES} in all",
                param=field,
            )
