"""The tokens in a job: those of its prompts, and those that its sampling names."""

from anyio import to_thread

from buddy_server.api.field_types import refused
from buddy_server.api.job import Conversation, Job
from buddy_server.engine.messages import EngineInfo, SamplingParams
from buddy_server.errors import ContextLengthExceeded, InvalidRequest, shown
from buddy_server.tokenizer import ChatTokenizer, PromptTooLong


async def prompt_tokens(tokenizer: ChatTokenizer, job: Job, info: EngineInfo) -> list[tuple[int, ...]]:
    """The tokens of every prompt of `job`.

    Raises InvalidRequest, or ContextLengthExceeded for a prompt that is far too long.
    """
    limit = context_limit(info)[0]
    if isinstance(job.prompts, Conversation) or isinstance(job.prompts[0], str):
        # Tokenizing a long text takes a while; other requests must not wait for it.
        prompts = await to_thread.run_sync(_tokenized, tokenizer, job, limit)
    else:
        prompts = _tokenized(tokenizer, job, limit)
    _check_vocabulary(prompts, info.vocab_size, job.prompt_field)
    return prompts


def check_named_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest if logit_bias or stop_token_ids contains a token that the model does not have."""
    for field, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token in tokens:
            if token >= vocab_size:
                raise refused(field, token, f"token ids of the model, 0 to {vocab_size - 1}")


def context_limit(info: EngineInfo) -> tuple[int, str]:
    """How many tokens a request may have, prompt and answer together, and what sets this limit."""
    limit = min(info.max_context, info.kv_capacity_tokens)
    return limit, "the model's context" if limit == info.max_context else "the cache of this server"


def _tokenized(tokenizer: ChatTokenizer, job: Job, limit: int) -> list[tuple[int, ...]]:
    try:
        if isinstance(job.prompts, Conversation):
            return [tokenizer.render(job.prompts.messages, limit, job.prompts.tools)]
        return [tokenizer.encode_prompt(one, limit) if isinstance(one, str) else tuple(one) for one in job.prompts]
    except InvalidRequest as error:
        # The tokenizer names the field of chat completions.
        param = job.prompt_field if error.param == "messages" else error.param
        raise InvalidRequest(error.message, param=param) from None
    except PromptTooLong as error:
        field = job.prompt_field
        raise ContextLengthExceeded(
            f"There are at least {error.num_tokens} tokens in the {field}; prompt and completion together may have "
            f"{limit}.",
            param=field,
        ) from None


def _check_vocabulary(prompts: list[tuple[int, ...]], vocab_size: int, field: str) -> None:
    """Some published tokenizers have a token more than their model, and clients may send any token id."""
    highest = max((max(prompt) for prompt in prompts if prompt), default=0)
    if highest >= vocab_size:
        raise InvalidRequest(
            f"There is token {shown(highest)} in the {field}, the model's tokens are 0 to {vocab_size - 1}.",
            param=field,
        )
