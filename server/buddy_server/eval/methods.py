"""The ways of choosing layers that an evaluation compares: every one a source of masks that the engine can serve."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from buddy_routing.router import NEVER, LearnedRouter, StaticRouter
from buddy_routing.router_config import INDICATORS
from buddy_server.engine.build import Routing, ServedModel, make_routing

METHODS = ("router", "router:once", "auto", "random", *(f"prior:{name}" for name in INDICATORS))


class MethodError(ValueError):
    """A method that does not exist, or that the router at hand cannot do."""


def check_methods(methods: Sequence[str]) -> None:
    """Raises MethodError for one that does not exist."""
    for method in methods:
        if method not in METHODS:
            raise MethodError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")


def routing_of(method: str, router: str, served: ServedModel, seed: int) -> Routing:
    """The masks of a method that `check_methods` knows. Raises MethodError, ArtifactError.

    "router" is the artifact `router`; "router:once" keeps the path of the prompt's end; "auto" is the artifact with its
    Budget Predictor; "random" a ranking drawn by the seed; "prior:" and an indicator a static ranking.
    """
    match method:
        case "router" | "auto":
            routing = make_routing(router, served)
            if method == "auto" and routing.predictor is None:
                raise MethodError(f"method 'auto' needs a Budget Predictor, and {router} has none")
            return routing
        case "router:once":
            routing = make_routing(router, served)
            if not isinstance(routing.router, LearnedRouter):
                raise MethodError(f"method 'router:once' needs a learned router, not {router}")
            routing.router.reroute_every = NEVER
            return replace(routing, predictor=None)
        case "random":
            generator = torch.Generator().manual_seed(seed)
            ranking = torch.rand(served.loaded.model.spec.num_layers - 2, generator=generator)
            return Routing(StaticRouter(ranking, f"random:{seed}"))
        case _:
            return make_routing(method, served)
