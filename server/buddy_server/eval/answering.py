"""Runs a batch of questions on the real engine, in this process and without HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, PromptEvent, SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a question and the milli-layers that each may cost."""

    tokens: tuple[int, ...]
    max_cost: int


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` is the whole answer; `paths` holds the actions of the layers for each of its tokens."""

    text: str
    paths: tuple[bytes, ...]


def greedy_answers(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int, align_paths: bool = False
) -> Iterator[tuple[int, Answer]]:
    """Answers as they finish: (index of the prompt, greedy answer)."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    texts = [""] * len(prompts)
    paths: list[list[bytes]] = [[] for _ in prompts]
    _add(engine, prompts, sampling, align_paths)
    while engine.has_work:
        for request_id, event in engine.step().events:
            index = int(request_id)
            match event:
                case TokenEvent():
                    texts[index] += event.text
                    paths[index].append(event.path)
                case FinishEvent():
                    yield index, Answer(texts[index] + event.text, tuple(paths[index]))


def log_likelihoods(engine: Engine, prompts: Sequence[Prompt], num_given: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Log probabilities of the text after the first `num_given` tokens of each prompt, as they finish."""
    _add(engine, prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    while engine.has_work:
        for request_id, event in engine.step().events:
            if isinstance(event, PromptEvent):
                index = int(request_id)
                # The prompt's first token has no log probability.
                yield index, sum(token.logprob for token in event.logprobs[num_given[index] - 1 :])


def _add(engine: Engine, prompts: Sequence[Prompt], sampling: SamplingParams, align_paths: bool = False) -> None:
    for index, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(index), "eval", prompt.tokens, prompt.max_cost, sampling, align_paths))
