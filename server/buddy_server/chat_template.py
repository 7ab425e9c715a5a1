"""A model's chat template, which turns messages into the text of a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from buddy_server.errors import ConfigError
from buddy_server.user_text import joined, printed

RENDER_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What third-party templates raise on messages they do not expect."""


class ChatTemplate:
    """The template `source` as transformers compiles it, except that macros keep the marks of texts. `special_tokens`
    are variables in it, such as bos_token. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(source).environment.overlay()
        environment.concat = joined
        self.source = source
        self.renders_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, with `add_generation_prompt` up to where the assistant's answer begins.

        Raises one of RENDER_ERRORS.
        """
        # Unlike here, `apply_chat_template` would pass plain texts to the template instead of marked ones.
        return printed(
            self._template.render(
                messages=messages,
                # Templates test for none, as transformers gives them.
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        )


def read_chat_template(path: Path) -> str:
    """The template in a file. Raises ConfigError if it cannot be read or has an error in its syntax."""
    try:
        source = path.read_text(encoding="utf-8")
        ChatTemplate(source, {})
    except OSError as error:
        raise ConfigError(f"chat template {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"chat template {path}: it is not UTF-8 text") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template {path}:{error.lineno}: {error.message}") from None
    return source
