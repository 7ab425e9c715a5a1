"""The methods of choosing layers that an evaluation compares: each is a source of paths that the engine can serve."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from buddy_routing.adapter import ADAPTER_DIR
from buddy_routing.duo import DuoRouter
from buddy_routing.exits import ExitRouter
from buddy_routing.router import NEVER, LearnedRouter, StaticRouter
from buddy_routing.router_config import INDICATORS
from buddy_routing.train.example import ExampleBatch
from buddy_routing.train.prompt_sets import train_prompt_sets
from buddy_server.engine.routing import Routing, make_routing
from buddy_server.engine.served_model import ServedModel
from buddy_server.eval.row import fixed_method

METHODS = (
    "router",
    "router:once",
    "router:aligned",
    "router:zero-kv",
    "auto",
    "exits",
    "auto:exits",
    "duo",
    "auto:duo",
    "prompt-sets",
    "random",
    *(f"prior:{name}" for name in INDICATORS),
    "bound",
    "bound:duo",
)


class MethodError(ValueError):
    """A method that does not exist, or that this router does not support."""


def check_methods(methods: Sequence[str]) -> None:
    """Raises MethodError for an unknown method."""
    for method in methods:
        if method not in METHODS:
            raise MethodError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")


@dataclass(frozen=True, slots=True)
class MethodSource:
    """The sources of methods: the artifacts that `router`, `exits` and `duo` name, and examples to calibrate baselines
    on."""

    served: ServedModel
    router: str
    exits: str | None
    duo: str | None
    calibration: Sequence[ExampleBatch]

    def routing(self, method: str, seed: int) -> Routing:
        """The routing of a method that `check_methods` accepts, except the bounds. Raises MethodError, ArtifactError.

        "router" is the first artifact, also for "router:zero-kv" (zero_filling.py) and "router:aligned", where all
        answers of a batch share paths; "router:once" keeps the path chosen at the prompt's end; "exits" and "duo" are
        the other artifacts; "auto", "auto:exits" and "auto:duo" are the three with their Budget Predictors;
        "prompt-sets" chooses one of a few rankings for each prompt; "random" is a ranking drawn by the seed; "prior:"
        plus an indicator is a measured ranking.
        """
        match method:
            case "router" | "router:zero-kv" | "router:aligned":
                routing = make_routing(self.router, self.served)
                if isinstance(routing.router, ExitRouter | DuoRouter):
                    raise MethodError(
                        f"method {method!r} needs a router, and {self.router} is another kind of artifact: "
                        "give it by --exits or --duo, for the methods exits or duo"
                    )
                return routing
            case "auto" | "auto:exits" | "auto:duo":
                routing = self.routing(fixed_method(method), seed)
                if routing.predictor is None:
                    raise MethodError(f"method {method!r} needs a Budget Predictor, and its artifact has none")
                return routing
            case "exits":
                if self.exits is None:
                    raise MethodError("method 'exits' needs exits: give --exits DIR")
                return self._beside_router(self.exits, "exits", ExitRouter)
            case "duo":
                if self.duo is None:
                    raise MethodError("method 'duo' needs small FFNs: give --duo DIR")
                return self._beside_router(self.duo, "duo", DuoRouter)
            case "router:once":
                routing = make_routing(self.router, self.served)
                if not isinstance(routing.router, LearnedRouter):
                    raise MethodError(f"method 'router:once' needs a learned router, not {self.router}")
                routing.router.reroute_every = NEVER
                return replace(routing, predictor=None)
            case "prompt-sets":
                if not self.calibration:
                    raise MethodError("method 'prompt-sets' needs questions to learn from: give --calibration FILE")
                return Routing(train_prompt_sets(self.served.loaded.model, self.calibration, seed))
            case "random":
                generator = torch.Generator().manual_seed(seed)
                ranking = torch.rand(len(self.served.loaded.model.spec.actions.free), generator=generator)
                return Routing(StaticRouter(ranking, f"random:{seed}"))
            case _:
                return make_routing(method, self.served)

    def _beside_router(self, artifact: str, method: str, kind: type[ExitRouter | DuoRouter]) -> Routing:
        for changing in (artifact, self.router):
            if (Path(changing).expanduser() / ADAPTER_DIR).exists():
                raise MethodError(
                    f"{changing} changes the model ({ADAPTER_DIR}/), so nothing else can be compared with it in one "
                    "evaluation: give it as --router DIR and leave out exits and duo"
                )
        routing = make_routing(artifact, self.served)
        if not isinstance(routing.router, kind):
            raise MethodError(
                f"method {method!r} needs an artifact of `buddy train {method}`, and {artifact} is another"
            )
        return routing
