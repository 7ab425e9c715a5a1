"""How good a model is at a budget: held-out tasks answered by the real engine, and bits per byte of text."""

# T tokens

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.tasks import FAMILIES, Task, is_correct, mentions_required, sample_tasks, story_requests
from buddy_server.engine.build import BuiltEngine
from buddy_server.eval.answering import greedy_answers
from buddy_server.tokenizer import ChatTokenizer

MAX_ANSWER_TOKENS = 96
MAX_STORY_TOKENS = 240
CONTEXT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Accuracy of one family at one budget; `mean_layers` is measured, not promised."""

    family: str
    num_run_layers: int
    num_tasks: int
    accuracy: float
    mean_layers: float


def task_accuracy(
    built: BuiltEngine, tokenizer: ChatTokenizer, num_run_layers: int, tasks_per_family: int, seed: int
) -> list[TaskResult]:
    """Greedy answers to held-out tasks, `tasks_per_family` of each family, levels equally often."""
    tasks = [
        task
        for family in FAMILIES
        for task in sample_tasks(seed, tasks_per_family, split="heldout", families=(family,))
    ]
    prompts = [tokenizer.render([{"role": "user", "content": task.prompt}]) for task in tasks]
    correct: dict[str, list[bool]] = defaultdict(list)
    layers: dict[str, list[int]] = defaultdict(list)
    answers = greedy_answers(built.engine, prompts, num_run_layers, MAX_ANSWER_TOKENS)
    for index, answer in tqdm(answers, total=len(tasks), desc=f"{num_run_layers} layers", unit="task", mininterval=2):
        task: Task = tasks[index]
        correct[task.family].append(is_correct(task, answer.text))
        layers[task.family] += answer.layers_per_token
    return [
        TaskResult(
            family, num_run_layers, len(correct[family]), _mean(correct[family]), round(_mean(layers[family]), 4)
        )
        for family in FAMILIES
    ]


def story_obedience(
    built: BuiltEngine, tokenizer: ChatTokenizer, num_run_layers: int, stories: Sequence[str], seed: int
) -> float:
    """Share of greedy stories that mention everything their request names; requests that name nothing are left out."""
    requests = [request for request in story_requests(stories, seed) if request.required]
    prompts = [tokenizer.render([{"role": "user", "content": request.prompt}]) for request in requests]
    answers = greedy_answers(built.engine, prompts, num_run_layers, MAX_STORY_TOKENS)
    told = tqdm(answers, total=len(requests), desc="stories", unit="story", mininterval=2)
    return _mean([mentions_required(requests[index], answer.text) for index, answer in told])


@torch.inference_mode()
def bits_per_byte(model: RoutedDecoder, tokenizer: ChatTokenizer, texts: Sequence[str]) -> float:
    """Bits a byte that the model needs for `texts` at full depth, in windows of `CONTEXT_TOKENS`.

    Every window starts cold, with the tokenizer's start token, so the figure errs on the high side.
    """
    total_bits, total_bytes = 0.0, 0
    for text in tqdm(texts, desc="bits per byte", unit="text", mininterval=2):
        tokens = tokenizer.encode_text(text)
        total_bytes += len(text.encode("utf-8"))
        for start in range(0, len(tokens), CONTEXT_TOKENS - 1):
            window = torch.tensor([[tokenizer.start_token_id, *tokens[start : start + CONTEXT_TOKENS - 1]]])  # [1, T]
            logits = model.lm_head(model.dense(window[:, :-1])).float()
            total_bits += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item() / math.log(2)
    return total_bits / total_bytes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
