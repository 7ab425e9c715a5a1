"""Fields of OpenAI and of other servers that this server knows and cannot honour, where ignoring them would silently
give another answer than the client asked for."""

import json
from collections.abc import Container, Mapping
from typing import Any

from buddy_server.errors import UnsupportedField, shown

_NO_EXTRA_PENALTY = "use presence_penalty or frequency_penalty"
_NO_SAMPLER = "use temperature, top_p, top_k or min_p"
_STRUCTURE = "use response_format or structured_outputs; in /v1/responses, text.format"
_TEMPLATE = "the server renders the model's own chat template"
_LENGTH = "use max_completion_tokens, or max_tokens"
_TOOLS = "use /v1/chat/completions"

Unsupported = tuple[tuple[object, ...], str]
"""The values of a field that change nothing, besides null, and what to do instead of any other."""

UNSUPPORTED_FIELDS: Mapping[str, Unsupported] = {
    # OpenAI
    "modalities": ((["text"],), "the output is text"),
    "audio": ((), "the output is text"),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "functions": (([],), "give tools instead"),
    "function_call": (("none",), "give tools and tool_choice instead"),
    "response_format": (({"type": "text"},), _STRUCTURE),
    "web_search_options": ((), "the server searches nothing"),
    "moderation": ((), "the server moderates nothing"),
    "best_of": ((1,), "use n"),
    "echo": ((False,), "use /v1/completions"),
    # vLLM
    "repetition_penalty": ((1,), _NO_EXTRA_PENALTY),
    "length_penalty": ((1,), "there is no beam search"),
    "use_beam_search": ((False,), "there is no beam search"),
    "min_tokens": ((0,), "use ignore_eos, which runs to max_tokens"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": ((), "use logit_bias"),
    "logits_processors": (([],), "use logit_bias"),
    "include_stop_str_in_output": ((False,), "the stop string is never part of the answer"),
    "skip_special_tokens": ((True,), "special tokens are never part of the answer"),
    "truncate_prompt_tokens": ((), "the server never cuts a prompt"),
    "prompt_logprobs": ((), "use /v1/completions with echo and logprobs"),
    "prompt_embeds": ((), "use prompt"),
    "return_token_ids": ((False,), "use logprobs, whose bytes identify tokens"),
    "return_tokens_as_token_ids": ((False,), "use logprobs, whose bytes identify tokens"),
    "add_special_tokens": ((False,), _TEMPLATE),
    "add_generation_prompt": ((True,), _TEMPLATE),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "documents": (([],), _TEMPLATE),
    "chat_template": ((), _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
    "structured_outputs": ((), _STRUCTURE),
    "structural_tag": ((), _STRUCTURE),
    "guided_json": ((), _STRUCTURE),
    "guided_regex": ((), _STRUCTURE),
    "guided_choice": ((), _STRUCTURE),
    "guided_grammar": ((), _STRUCTURE),
    "guided_whitespace_pattern": ((), _STRUCTURE),
    "thinking_token_budget": ((), _LENGTH),
    # llama.cpp
    "n_predict": ((), _LENGTH),
    "n_probs": ((0,), "use logprobs"),
    "n_indent": ((0,), "there is no minimum of indentation"),
    "t_max_predict_ms": ((0,), _LENGTH),
    "json_schema": ((), _STRUCTURE),
    "grammar": (("",), _STRUCTURE),
    "repeat_penalty": ((1,), _NO_EXTRA_PENALTY),
    "dry_multiplier": ((0,), _NO_EXTRA_PENALTY),
    "typical_p": ((1,), _NO_SAMPLER),
    "top_n_sigma": ((-1,), _NO_SAMPLER),
    "xtc_probability": ((0,), _NO_SAMPLER),
    "dynatemp_range": ((0,), _NO_SAMPLER),
    "mirostat": ((0,), _NO_SAMPLER),
    "min_keep": ((0,), _NO_SAMPLER),
    "samplers": ((), _NO_SAMPLER),
    "lora": (([],), "the server has one model and no adapters"),
    "return_tokens": ((False,), "use logprobs, whose bytes identify tokens"),
    # Ollama
    "options": (({},), "give each option as a field of the request"),
    "num_predict": ((), _LENGTH),
    "format": (("",), _STRUCTURE),
    "think": ((False,), _TEMPLATE),
    "raw": ((False,), "use /v1/completions"),
    "system": (("",), "use a message with the role system"),
    "template": (("",), _TEMPLATE),
    "context": (([],), "use messages"),
    "images": (([],), "the input is text"),
    "suffix": (("",), "nothing can be put between a prompt and a suffix"),
}


def refuse_unsupported(
    body: Mapping[str, Any], unsupported: Mapping[str, Unsupported], supported: Container[str]
) -> None:
    """Raise UnsupportedField for a field of `body` that is `unsupported`, not `supported` after all, and has a value
    that is not harmless."""
    for field, value in body.items():
        if field in supported or field not in unsupported or value is None:
            continue
        harmless, reason = unsupported[field]
        # To Python, true is 1.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless):
            allowed = " or ".join(map(json.dumps, (None, *harmless)))
            raise UnsupportedField(
                f"{field}: {shown(value)} is not supported: {reason}; allowed is {allowed}", param=field
            )
