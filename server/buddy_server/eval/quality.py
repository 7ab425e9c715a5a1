"""Measures without a single right answer: stories written to a request, and bits per byte of text."""

# T tokens, D model dim

import math
from collections.abc import Callable, Sequence
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.exits import ExitRouter
from buddy_routing.features import causal_features
from buddy_routing.path_source import decoder_for
from buddy_routing.router import Router
from buddy_routing.selection import action_shares, select_path
from buddy_routing.tasks import mentions_required, story_requests
from buddy_server.engine.engine import Engine
from buddy_server.eval.answering import Prompt, greedy_answers
from buddy_server.tokenizer import ChatTokenizer

MAX_STORY_TOKENS = 240
CONTEXT_TOKENS = 256


def story_obedience(
    engine: Engine, tokenizer: ChatTokenizer, max_cost: int, stories: Sequence[str], seed: int
) -> float:
    """Share of greedy stories that mention everything their request names; requests that name nothing are skipped."""
    requests = [request for request in story_requests(stories, seed) if request.required]
    rendered = (tokenizer.render([{"role": "user", "content": request.prompt}]) for request in requests)
    answers = greedy_answers(engine, [Prompt(tokens, max_cost) for tokens in rendered], MAX_STORY_TOKENS)
    told = tqdm(answers, total=len(requests), desc="stories", unit="story", mininterval=2)
    return mean(mentions_required(requests[index], answer.text) for index, answer in told)


@torch.inference_mode()
def bits_per_byte(
    model: RoutedDecoder, tokenizer: ChatTokenizer, texts: Sequence[str], router: Router | ExitRouter, max_cost: int
) -> float:
    """Bits per byte that the model needs for `texts`, in windows of `CONTEXT_TOKENS`, routed at every token.

    Every window starts without context, at the tokenizer's start token, so the figure errs on the high side.
    """
    total_bits, total_bytes = 0.0, 0
    hidden_of = _hidden_states(model, router, max_cost)
    for text in texts:
        tokens = tokenizer.encode_text(text)
        total_bytes += len(text.encode("utf-8"))
        for start in range(0, len(tokens), CONTEXT_TOKENS - 1):
            ids = [tokenizer.start_token_id, *tokens[start : start + CONTEXT_TOKENS - 1]]
            window = torch.tensor([ids], device=model.inv_freq.device)  # [1, T]
            logits = model.lm_head(hidden_of(window[:, :-1])).float()
            total_bits += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item() / math.log(2)
    return total_bits / total_bytes


def _hidden_states(model: RoutedDecoder, router: Router | ExitRouter, max_cost: int) -> Callable[[Tensor], Tensor]:
    """Maps tokens [1, T] to final hidden states [1, T, D]."""
    decoder = decoder_for(model, router)
    actions = decoder.spec.actions
    if isinstance(router, ExitRouter):
        number = actions.exit_paths.index(actions.exit_path(max_cost))

        def at_exit(tokens: Tensor) -> Tensor:
            full, left = decoder.dense_exits(tokens)
            return [*left, full][number]

        return at_exit

    def choose(v: Tensor) -> Tensor:
        features = causal_features(v)[0]  # [T, 2F]
        paths = select_path(router.scores(features), torch.tensor(max_cost, device=v.device), actions)
        return action_shares(paths)[None]

    return lambda tokens: decoder.dense(tokens, choose)
