"""Balcony's exits (arXiv 2503.05005): a sequence leaves the model after the layers that its budget pays for."""

from collections.abc import Mapping

from buddy_routing.action_space import ActionSpace
from buddy_routing.decoder import Exit, RoutedDecoder
from buddy_routing.router import FIXED


class ExitRouter:
    """Every sequence takes the deepest of the `exits`, by numbers of layers, that its tokens may cost, and keeps it:
    nothing is scored."""

    reroute_every = FIXED

    def __init__(self, exits: Mapping[int, Exit], router_id: str) -> None:
        self.exits = exits
        self.router_id = router_id


def new_exits(model: RoutedDecoder, after: tuple[int, ...]) -> dict[int, Exit]:
    """Untrained exits after these numbers of layers, in fp32: copies of the last layer and, as the norm before the
    head, of the input norm of the first layer that they replace.

    Raises ValueError for exits that the model cannot have.
    """
    ActionSpace.of_exits(model.spec.num_layers, after)
    exits = {}
    for num_layers in after:
        exit_ = Exit(model.spec).to(model.inv_freq.device)
        exit_.layer.load_state_dict(model.blocks[-1].state_dict())
        exit_.norm.load_state_dict(model.blocks[num_layers].input_layernorm.state_dict())
        exits[num_layers] = exit_
    return exits
