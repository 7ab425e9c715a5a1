"""Tokenizers of the families that the server serves, in small: their kinds of tokens, normalizers and templates."""

from collections.abc import Callable
from functools import partial

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_CORPUS = [
    "the cat sat on the mat and the bird sat on the cat; is that so? user system assistant tool think call",
    '{"name": "fly", "arguments": {"to": "you"}} [1, 2] <a> |b| INST start end im header id eot',
] * 8

_CALLS = (
    "{%- for call in m.tool_calls or [] %}OPEN{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}, \"id\": \"{{ call.id }}\"}CLOSE{% endfor -%}"
)  # fmt: skip
_RESULT = "{%- if m.tool_call_id %}{{ m.tool_call_id }} {% endif -%}{%- if m.name %}{{ m.name }}: {% endif -%}"

LLAMA3 = (
    '{{ bos_token }}{% if tools %}{{ \'<|start_header_id|>system<|end_header_id|>\n\nanswer {"name": ..., '
    "\"parameters\": ...}\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{{ '<|eot_id|>' }}"
    "{% endif %}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    + _CALLS.replace("OPEN", "<|python_tag|>").replace("CLOSE", "")
    + _RESULT
    + "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_THOUGHT = "{%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif -%}"
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}"
    "{{ '\n</tools><tool_call>\n{...}\n</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{%- set content = m.content %}"
    + _THOUGHT
    + "{{ '<|im_start|>' + m.role + '\n' }}"
    + _CALLS.replace("OPEN", "<tool_call>\n").replace("CLOSE", "\n</tool_call>")
    + _RESULT
    + "{{ content + '<|im_end|>' + '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
MISTRAL = (
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS] [' }}{% for tool in tools %}{{ '{' }}"
    "{% for key, value in tool.function.items() %}{{ '\"' + key + '\": ' }}"
    "{{ '\"' + value + '\"' if value is string else value | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ '}' }}"
    "{% endfor %}{{ '][/AVAILABLE_TOOLS]' }}{% endif %}{% for m in messages %}"
    + _CALLS.replace("OPEN", "[TOOL_CALLS] [").replace("CLOSE", "]")
    + "{% if m.role == 'tool' %}{{ '[TOOL_RESULTS] ' }}"
    + _RESULT
    + "{{ m.content ~ '[/TOOL_RESULTS]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' }}" + _RESULT + "{{ m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.name %}{{ '<|' + m.name + '|>' }}{% endif %}"
    "{{ '\n' + m.content + '<|end|>\n' }}{% endfor %}{{ '<|assistant|>' }}"
)


def llama3() -> PreTrainedTokenizerBase:
    """Bytes, words of the vocabulary taken whole, special tokens behind the vocabulary."""
    tokenizer = _byte_level(ignore_merges=True)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    return _published(tokenizer, special, [], LLAMA3, bos_token=special[0], eos_token=special[3])


def llama3_with_beginning() -> PreTrainedTokenizerBase:
    """As published: the tokenizer itself puts a token before every text."""
    published = llama3()
    begin = published.bos_token
    published.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, published.bos_token_id)]
    )
    return published


def qwen3() -> PreTrainedTokenizerBase:
    """Bytes, NFC, and tokens that are added but not special."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    special = ["<|im_start|>", "<|im_end|>"]
    return _published(tokenizer, special, plain, QWEN3, eos_token=special[1])


def phi() -> PreTrainedTokenizerBase:
    """Tokens that swallow the white space behind them, and a template that joins them from pieces."""
    tokenizer = _byte_level()
    special = [AddedToken(f"<|{role}|>", rstrip=True, normalized=False) for role in ("system", "user", "assistant")]
    return _published(tokenizer, [*special, "<|tool|>", "<|end|>"], ["    ", "\n"], PHI, eos_token="<|end|>")


def mistral(prepend: str = "first") -> PreTrainedTokenizerBase:
    """As from SentencePiece: spaces are letters, other characters bytes, control tokens words of the vocabulary."""
    special = [
        "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
        "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    ]  # fmt: skip
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _train(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], [])
    return _published(tokenizer, special, [], MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2() -> PreTrainedTokenizerBase:
    """The older kind, whose normalizer puts a space before every piece of a text."""
    published = mistral()
    backend = published.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return published


REMOVED = {
    "text | replace('</think>', '')": "</think>",
    "text.split('</think>') | join": "</think>",
    "text.split('</think>')[0] ~ text.split('</think>')[-1]": "</think>",
    "text | replace('/no_think', '')": "/no_think",
    "text | replace('\\r', '')": "\r",
    "(text ~ '') | replace('\\r', '') | lower": "\r",
}
"""What a template may make of a text, and what it removes from it."""
RELETTERED = ("text | lower", "text.lower()", "(text ~ '') | lower", "text | title | lower")
"""What a template may make of a text that changes letters."""


def changing(change: str, published: Callable[[], PreTrainedTokenizerBase] = qwen3) -> PreTrainedTokenizerBase:
    """As `published`, but the template prints `change` in place of every `text` of a message."""
    changed = published()
    template = str(changed.chat_template).replace(_THOUGHT, "")
    for text in ("call.function.name", "call.function.arguments | tojson", "call.id", "m.tool_call_id", "m.name"):
        template = template.replace("{{ " + text, "{{ changed(" + text + ")")
    for text in ("m.content", "content"):
        template = template.replace("{{ " + text + " ", "{{ changed(" + text + ") ")
    changed.chat_template = "{%- macro changed(text) %}{{ " + change + " }}{% endmacro -%}" + template
    return changed


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama3": llama3,
    "qwen3": qwen3,
    "phi": phi,
    "mistral": mistral,
    "mistral-always": lambda: mistral("always"),
    "llama2": llama2,
    **{f"qwen3, {change}": partial(changing, change) for change in (*REMOVED, *RELETTERED)},
}


def _byte_level(**options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    words = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)


def _published(
    tokenizer: Tokenizer, special: list[str | AddedToken], plain: list[str], template: str, **names: str
) -> PreTrainedTokenizerBase:
    # Made anew, because those of the training are all special and the byte tokens are not added ones.
    fresh = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(fresh, part, value)
    fresh.add_special_tokens(special)
    fresh.add_tokens([AddedToken(name, normalized=False) for name in plain])
    published = PreTrainedTokenizerFast(tokenizer_object=fresh, clean_up_tokenization_spaces=False, **names)
    published.chat_template = template
    return published
