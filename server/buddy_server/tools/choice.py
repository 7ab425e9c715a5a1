"""Which functions an answer may call, and how many."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 16
"""Calls in an answer that has to call: without a limit, a weak model would go on until its tokens are used up."""


@dataclass(frozen=True, slots=True)
class Function:
    """`parameters` is the JSON schema of its arguments, None for a function without any; the request has it in `field`.
    Unless `is_strict`, parts of the schema that cannot be enforced are ignored."""

    name: str
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False
    field: str = "tools"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The functions that an answer may call. If `must_call`, it consists of 1 to `max_calls` calls; otherwise it may be
    text, calls, or text and then calls. Unless `is_enforced`, the model is only told so, and may make mistakes."""

    functions: tuple[Function, ...]
    must_call: bool = False
    max_calls: int = MAX_CALLS
    is_enforced: bool = False
