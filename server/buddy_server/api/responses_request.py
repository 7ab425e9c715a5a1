"""The body of POST /v1/responses, and how it becomes a job."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from buddy_server.api.field_types import Count, ItemText
from buddy_server.api.job import Conversation, Job
from buddy_server.api.json_bound import JsonBound
from buddy_server.api.response_format import TextFormat
from buddy_server.api.schema import Schema
from buddy_server.api.schemas import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    GenerationFields,
)
from buddy_server.api.tool_fields import FlatToolFields
from buddy_server.api.unsupported_fields import UNSUPPORTED_FIELDS, Unsupported
from buddy_server.errors import UnsupportedField, shown

_NOT_STORED = "the server stores no responses, so send all earlier items as input"
_UNSUPPORTED: Mapping[str, Unsupported] = {
    "previous_response_id": ((), _NOT_STORED),
    "conversation": ((), _NOT_STORED),
    "background": ((False,), "the server stores no responses"),
    "prompt": ((), "the server stores no prompts"),
    "response_format": ((), "the name of this field here is text.format"),
    "max_tokens": ((), "the name of this field here is max_output_tokens"),
    "max_completion_tokens": ((), "the name of this field here is max_output_tokens"),
    "messages": ((), "the name of this field here is input"),
    "n": ((1,), "a response has one answer"),
}
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def _needs(kind: str) -> dict[str, Any]:
    """The JSON schema of what an item of this kind must have."""
    present = {field: {"not": {"type": "null"}} for field in _NEEDED[kind]}
    types: list[str | None] = ["message", None] if kind == "message" else [kind]
    required = [*_NEEDED[kind], *(() if kind == "message" else ["type"])]
    return {"required": required, "properties": {"type": {"enum": types}, **present}}


class InputItem(Schema):
    """A message, a call that the model made earlier, or what came of one. After validation, `content` and `output` are
    single texts."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_needs(kind) for kind in _NEEDED]})

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: ItemText = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: ItemText = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        kind = self.type or "message"
        for field in _NEEDED[kind]:
            if getattr(self, field) is None:
                raise ValueError(f"a {kind} needs the field {field}")
        return self


class TextOptions(Schema):
    format: TextFormat | None = None


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Input = Annotated[_Items, BeforeValidator(_as_items, json_schema_input_type=str | _Items)]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponsesRequest(GenerationFields, FlatToolFields):
    """The body of POST /v1/responses, for a server that stores nothing: `store` is ignored, and what would need a store
    raises UnsupportedField."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    """"message.output_text.logprobs" asks for log probabilities."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    user: str | None = None

    unsupported: ClassVar[Mapping[str, Unsupported]] = {**UNSUPPORTED_FIELDS, **_UNSUPPORTED}

    @model_validator(mode="before")
    @classmethod
    def _refuse_built_in_tools(cls, raw: object) -> object:
        tools = raw.get("tools") if isinstance(raw, dict) else None
        for index, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if kind != "function":
                field = f"tools[{index}].type"
                raise UnsupportedField(
                    f'{field}: {shown(kind)} is not supported: allowed is "function"; there are no built-in tools',
                    param=field,
                )
        return raw

    @model_validator(mode="after")
    def _bounded_arguments(self) -> Self:
        # Templates print arguments as JSON, so they are parsed as well.
        bound = JsonBound()
        for place, item in enumerate(self.input):
            bound.add((item.arguments or "").encode(), f"input[{place}].arguments")
        return self

    def job(self) -> Job:
        with_logprobs = "message.output_text.logprobs" in (self.include or ())
        return Job(
            id_prefix="resp_",
            model=self.model,
            prompts=Conversation(self._messages(), self.tools_for_template()),
            prompt_field="input",
            limit_field="max_output_tokens",
            sampling=self.sampling(
                self.max_output_tokens, top_logprobs=(self.top_logprobs or 0) if with_logprobs else None
            ),
            budget=self.budget,
            stream=bool(self.stream),
            trace=self.trace,
            tool_choice=self.chosen_tools(),
            form=self.text_format.form(),
        )

    @property
    def text_format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat(type="text")

    def _messages(self) -> list[dict[str, Any]]:
        """The items as chat messages. Calls belong to the assistant's message before them, as templates expect."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if item.type == "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            elif item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            else:
                messages.append({"role": item.role, "content": item.content})
        return messages
