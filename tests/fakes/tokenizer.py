"""A small real tokenizer with a chat template, built on the spot."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == 'user' and 'forbidden' in message.content -%}{{ raise_exception('not this word') }}{%- endif -%}
<|{{ message.role }}|> {{ message.content }}
{%- for call in message.tool_calls or [] %} {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %} <|end|> {% endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""  # noqa: E501

_ROLES = ("system", "user", "assistant", "tool", "end")
_WORDS = ("hi", "be", "brief", "you", "are", "a", "bird")


def build_tokenizer(directory: Path) -> Path:
    """Write the tokenizer as a Hugging Face directory, a word a token; returns `directory`."""
    special = [f"<|{role}|>" for role in _ROLES]
    vocabulary = {word: index for index, word in enumerate(["<unk>", *special, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Words with blanks between them, as without a decoder; llguidance needs to know how bytes are spelt.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece(cleanup=False)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
