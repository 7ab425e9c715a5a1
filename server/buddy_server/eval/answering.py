"""Asks the real engine a batch of questions, in this process and without HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import FinishEvent, GenerationRequest, SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` is the whole answer; `layers_per_token` holds how many layers each of its tokens ran."""

    text: str
    layers_per_token: tuple[int, ...]


def greedy_answers(
    engine: Engine, prompts: Sequence[Sequence[int]], num_run_layers: int, max_tokens: int
) -> Iterator[tuple[int, Answer]]:
    """Answers to tokenized prompts as they finish: (index of the prompt, its greedy answer)."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    texts = [""] * len(prompts)
    layers: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(index), "eval", tuple(prompt), num_run_layers, sampling))
    while engine.has_work:
        for request_id, event in engine.step().events:
            index = int(request_id)
            texts[index] += event.text
            if isinstance(event, TokenEvent):
                layers[index].append(len(event.layers))
            if isinstance(event, FinishEvent):
                yield index, Answer(texts[index], tuple(layers[index]))
