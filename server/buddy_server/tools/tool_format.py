"""The way in which a model is told of tools and calls them, recognized from its chat template."""

from collections.abc import Mapping
from dataclasses import dataclass

from buddy_server.tools.call_grammar import call_grammar
from buddy_server.tools.call_parser import CallParser
from buddy_server.tools.choice import ToolChoice
from buddy_server.tools.pieces import ToolParser
from buddy_server.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, Syntax


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`marker_ids` are the markers of calls that are tokens of the model. Unless `is_rendered`, the template does not
    tell the model of tools."""

    syntax: Syntax
    marker_ids: Mapping[str, int]
    is_rendered: bool

    @property
    def shown_tokens(self) -> tuple[int, ...]:
        """The tokens that must be part of an answer's text for a parser, even if they are special."""
        return tuple(self.marker_ids.values())

    def parser(self, choice: ToolChoice) -> ToolParser | None:
        """A parser for one answer; None if there cannot be calls in it."""
        if not (self.is_rendered or choice.must_call):
            return None
        return CallParser(self.syntax, {function.name for function in choice.functions}, choice.must_call)

    def grammar(self, choice: ToolChoice, text_grammar: str | None = None) -> str | None:
        """The grammar, serialized for llguidance, that keeps an answer to `choice`, and its text to `text_grammar`;
        None if nothing does. Only a marker tells JSON that is a call from JSON that is text: without one, no call is
        allowed beside such a text."""
        can_call = self.is_rendered and (text_grammar is None or self.syntax.marker)
        if not (choice.must_call or (can_call and (choice.is_enforced or text_grammar is not None))):
            return text_grammar
        return call_grammar(self.syntax, choice, self.marker_ids, text_grammar)


def find_format(template: str, is_rendered: bool, vocabulary: Mapping[str, int]) -> ToolFormat:
    """The format of a model with this chat template, which renders tools or not. `vocabulary` are the added tokens."""
    syntax = _syntax(template) if is_rendered else PLAIN
    ids = {marker: vocabulary[marker] for marker in syntax.markers if marker in vocabulary}
    return ToolFormat(syntax, ids, is_rendered)


def _syntax(template: str) -> Syntax:
    # Qwen3-Coder and others write XML behind the same marker.
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if '"parameters": ' in template and "<|eot_id|>" in template:
        return LLAMA3
    return PLAIN
