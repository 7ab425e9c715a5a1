"""The loss of each example's answer in a packed batch, under given paths."""

# B rows of examples, T tokens, E examples with an answer in reading order, D model dim, L layers

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.decoder import PathChooser, RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.first_layer import FirstLayer
from buddy_routing.route_sources import conversation_starts
from buddy_routing.selection import action_shares
from buddy_routing.train.example import ExampleBatch


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """`nats` is the mean cross-entropy over an answer's `num_tokens`, `agreement` the share of them that are the
    likeliest ones."""

    nats: Tensor  # [E]
    num_tokens: Tensor  # [E] fp32
    agreement: Tensor  # [E]

    @property
    def is_right(self) -> Tensor:
        """[E] bool: whether greedy decoding under the same path gives exactly the answer."""
        return self.agreement == 1


def answer_loss(model: RoutedDecoder, batch: ExampleBatch, choose: PathChooser) -> AnswerLoss:
    """The loss of every example, with paths from `choose` (RoutedDecoder.dense)."""
    with torch.no_grad():
        hidden = model.dense(batch.tokens, choose, starts=conversation_starts(batch.begins))
    return loss_of_states(model, batch, hidden)


@torch.no_grad()
def loss_of_states(model: RoutedDecoder, batch: ExampleBatch, hidden: Tensor) -> AnswerLoss:
    """The loss of every example, from final hidden states [B, T, D]."""
    logits = model.lm_head(hidden[batch.counted]).float()
    wanted = batch.tokens[batch.in_answer]
    example = example_of_token(batch)[batch.in_answer]
    zeros = torch.zeros(int(example.max()) + 1, device=wanted.device)
    nats = zeros.index_add(0, example, F.cross_entropy(logits, wanted, reduction="none"))
    agreed = zeros.index_add(0, example, (logits.argmax(-1) == wanted).float())
    num_tokens = zeros.index_add(0, example, torch.ones_like(example).float())
    return AnswerLoss(nats / num_tokens, num_tokens, agreed / num_tokens)


def example_of_token(batch: ExampleBatch) -> Tensor:
    """[B, T] int64: the example of each token; E for padding and for prompts whose answer was cut off."""
    begins = batch.begins.clone()
    begins[:, 0] = True
    number = begins.flatten().cumsum(0) - 1
    has_answer = torch.zeros(int(begins.sum()), dtype=torch.bool, device=begins.device)
    has_answer[number[batch.in_answer.flatten()]] = True
    renumbered = torch.where(has_answer, has_answer.cumsum(0) - 1, has_answer.sum())
    return renumbered[number].view_as(batch.tokens)


@torch.no_grad()
def prompt_features(model: RoutedDecoder, batch: ExampleBatch) -> Tensor:
    """[E, 2F]: features at the last token of every example's prompt."""
    features = causal_features(FirstLayer.of(model).v(batch.tokens), conversation_starts(batch.begins))
    return features[batch.counted & ~batch.in_answer]


def fixed_paths(batch: ExampleBatch, paths: Tensor) -> PathChooser:
    """One path per example, for prompt and answer: paths [E, L]."""
    # Padding belongs to no example, so its path does not matter.
    of_token = torch.cat((paths, paths[:1]))[example_of_token(batch)]
    return lambda _: action_shares(of_token)
