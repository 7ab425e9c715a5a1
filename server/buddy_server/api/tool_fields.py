"""The fields of a request about tools."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, model_validator

from buddy_server.api.field_types import refused
from buddy_server.api.json_bound import JsonBound
from buddy_server.errors import InvalidRequest, shown
from buddy_server.tools.choice import MAX_CALLS, Function, ToolChoice

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 2**16
MAX_SCHEMAS_BYTES = 2**18
"""Of all tools of a request together."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class FunctionDefinition(_Schema):
    """`parameters` is the JSON schema of the arguments, None for a function without any."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def function(self) -> Function:
        return Function(self.name, self.parameters, bool(self.strict))


class Tool(_Schema):
    type: Literal["function"]
    function: FunctionDefinition


@dataclass(frozen=True, slots=True)
class WantedCalls:
    """The field tool_choice. `names` are the functions that it names, None for all; `only_one` call may be made."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    only_one: bool = False


_CHOICES = (
    '"none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


def _wanted_calls(value: object) -> WantedCalls:
    match value:
        case "none" | "auto" | "required":
            return WantedCalls(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return WantedCalls("required", (name,), only_one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            names = [tool["function"]["name"] for tool in tools if _is_named(tool)]
            if tools and len(names) == len(tools):
                return WantedCalls(mode, tuple(names))
    raise refused("tool_choice", value, _CHOICES)


def _is_named(tool: object) -> bool:
    match tool:
        case {"type": "function", "function": {"name": str()}}:
            return True
    return False


class ToolFields(_Schema):
    """The fields of a chat about tools."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[WantedCalls, PlainValidator(_wanted_calls)] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _possible_calls(self) -> Self:
        check_schemas([tool.function for tool in self.tools or ()], "tools[{}].function.parameters")
        self.chosen_tools()
        return self

    def chosen_tools(self) -> ToolChoice | None:
        """What the answer may call; None for an answer without calls."""
        functions = [tool.function.function() for tool in self.tools or ()]
        return choose_tools(functions, self.tool_choice, self.parallel_tool_calls)


def choose_tools(functions: Sequence[Function], wanted: WantedCalls | None, parallel: bool | None) -> ToolChoice | None:
    """The calls that an answer may consist of, out of `functions`; None if there can be none.

    Raises InvalidRequest for a choice that these functions do not allow.
    """
    wanted = wanted or WantedCalls("auto")
    known = {function.name for function in functions}
    if wanted.mode == "none" or (wanted.mode == "auto" and not functions):
        return None
    if not functions:
        raise InvalidRequest("tool_choice: it asks for a call, but there are no tools", param="tool_choice")
    for name in wanted.names or ():
        if name not in known:
            raise refused("tool_choice", name, f"names of the tools: {shown(sorted(known))}")
    allowed = tuple(function for function in functions if wanted.names is None or function.name in wanted.names)
    must_call = wanted.mode == "required"
    only_one = wanted.only_one or parallel is False
    is_enforced = must_call or only_one or len(allowed) < len(functions) or any(one.is_strict for one in allowed)
    return ToolChoice(allowed, must_call, 1 if only_one else MAX_CALLS, is_enforced)


def check_schemas(functions: Sequence[FunctionDefinition], place: str) -> None:
    """Raise InvalidRequest if the parameters of a function are no schema of an object or too large. `place` is the
    field, with {} for the number of a function."""
    num_bytes = 0
    bound = JsonBound()
    for index, function in enumerate(functions):
        if function.parameters is None:
            continue
        field = place.format(index)
        kind = function.parameters.get("type", "object")
        if kind != "object":
            raise refused(f"{field}.type", kind, '"object": arguments have names')
        try:
            written = json.dumps(function.parameters, allow_nan=False).encode()
        except ValueError as error:
            raise InvalidRequest(f"{field}: it contains a number that JSON has not: {error}", param=field) from None
        bound.add(written, field)
        num_bytes += len(written)
        if len(written) > MAX_SCHEMA_BYTES or num_bytes > MAX_SCHEMAS_BYTES:
            raise InvalidRequest(
                f"{field}: the schema has {len(written)} bytes of JSON, all up to here {num_bytes}; allowed are "
                f"{MAX_SCHEMA_BYTES} in one, {MAX_SCHEMAS_BYTES} in all",
                param=field,
            )
