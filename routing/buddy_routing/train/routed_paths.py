"""The paths that a router chooses over whole rows of tokens, as in the server, with gradients to its scores."""

# B rows of tokens, T tokens, C free layers

import torch
from torch import Tensor

from buddy_routing.action_space import MILLI_LAYERS, ActionSpace
from buddy_routing.decoder import PathChooser
from buddy_routing.features import causal_features
from buddy_routing.route_sources import conversation_starts, route_sources
from buddy_routing.router import Router
from buddy_routing.selection import select_path, straight_through


def routed_paths(
    router: Router,
    actions: ActionSpace,
    begins: Tensor,
    in_answer: Tensor,
    max_cost: Tensor,
    route_block: int,
) -> PathChooser:
    """A chooser for RoutedDecoder.dense: `begins`, `in_answer` (bool) and `max_cost` (milli-layers of a token) are [B,
    T].

    The features are detached: gradients reach only the router's weights and the layers that run.
    """
    starts = conversation_starts(begins)
    sources = route_sources(starts, in_answer, route_block)

    def choose(v: Tensor) -> Tensor:
        # The server scores in fp32; training's mixed precision would create additional ties.
        with torch.autocast(v.device.type, enabled=False):
            scores = router.scores(causal_features(v.detach(), starts))  # [B, T, C]
        scores = scores.gather(1, sources[..., None].expand(-1, -1, scores.shape[-1]))
        return straight_through(scores, select_path(scores, max_cost, actions), actions)

    return choose


def cost_per_conversation(
    begins: Tensor, actions: ActionSpace, lowest_budget: float, most_layers: int, seed: int
) -> Tensor:
    """[B, T] int64: milli-layers of a token, the same for all tokens of a conversation: whole layers, uniform between
    what `lowest_budget` pays for, if it is less, and `most_layers`."""
    conversation = begins.cumsum(1)  # [B, T]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(begins), int(conversation.max()) + 1)
    lowest = actions.max_cost(max(lowest_budget, actions.smallest_budget)) // MILLI_LAYERS
    layers = torch.randint(min(lowest, most_layers), most_layers + 1, shape, generator=generator)
    return MILLI_LAYERS * layers.to(begins.device).gather(1, conversation)
