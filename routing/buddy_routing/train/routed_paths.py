"""The paths a router chooses over whole rows of tokens, as the server would, with gradients to its scores."""

# B rows of tokens, T tokens, L layers

import torch
from torch import Tensor

from buddy_routing.decoder import PathChooser
from buddy_routing.features import causal_features
from buddy_routing.route_sources import conversation_starts, route_sources
from buddy_routing.router import LearnedRouter
from buddy_routing.selection import select_layers, straight_through


def routed_paths(
    router: LearnedRouter, begins: Tensor, in_answer: Tensor, num_run: Tensor, route_block: int
) -> PathChooser:
    """For RoutedDecoder.dense: `begins`, `in_answer` (bool) and `num_run` (layers to run) are [B, T].

    The features are taken as given: the gradient reaches the router's weights and the layers that run.
    """
    starts = conversation_starts(begins)
    sources = route_sources(starts, in_answer, route_block)

    def choose(v: Tensor) -> Tensor:
        # The server scores in fp32; training's mixed precision would make ties of its own.
        with torch.autocast(v.device.type, enabled=False):
            scores = router.scores(causal_features(v.detach(), starts))  # [B, T, L - 2]
        scores = scores.gather(1, sources[..., None].expand(-1, -1, scores.shape[-1]))
        return straight_through(scores, select_layers(scores, num_run))

    return choose


def budget_per_conversation(begins: Tensor, lowest: int, highest: int, seed: int) -> Tensor:
    """[B, T] int64: layers to run, uniform from `lowest` to `highest`, the same for a conversation's tokens."""
    conversation = begins.cumsum(1)  # [B, T]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(begins), int(conversation.max()) + 1)
    return torch.randint(lowest, highest + 1, shape, generator=generator).to(begins.device).gather(1, conversation)
