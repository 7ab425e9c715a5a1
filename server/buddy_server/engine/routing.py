"""What chooses the paths in an engine: a trained artifact of any kind, or a static prior measured now."""

from dataclasses import dataclass
from pathlib import Path

import torch

from buddy_routing.artifact import load_predictor
from buddy_routing.embedded import embedded_router
from buddy_routing.exits import ExitRouter
from buddy_routing.path_source import decoder_for, load_path_source
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.prior import bundled_text, measure_prior
from buddy_routing.router import Router, StaticRouter
from buddy_routing.router_config import INDICATORS
from buddy_server.engine.served_model import EngineBuildError, ServedModel

DEFAULT_ROUTE_BLOCK = 128
PRIOR_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Routing:
    """The source of masks, its route block, and the predictor for requests without a budget."""

    router: Router | ExitRouter
    route_block: int = DEFAULT_ROUTE_BLOCK
    predictor: BudgetPredictor | None = None


def default_router(model: str | None) -> str:
    """The embedded model's own; for others the static prior that is the best of those that cost nothing to measure."""
    return str(embedded_router()) if model is None else "prior:cosine"


def make_routing(router: str, served: ServedModel) -> Routing:
    """`router` is an artifact's directory or "prior:" and an indicator. Raises EngineBuildError, ArtifactError."""
    if not router.startswith("prior:"):
        artifact = Path(router).expanduser()
        model = served.loaded.model
        source, route_block = load_path_source(artifact, model, served.loaded.fingerprint)
        actions = decoder_for(model, source).spec.actions
        return Routing(source, route_block, load_predictor(artifact, actions, model.spec.kv_dim, served.device))
    indicator = router.removeprefix("prior:")
    if indicator not in INDICATORS:
        allowed = ", ".join(f"prior:{name}" for name in INDICATORS)
        raise EngineBuildError(f"router {router!r} is unknown; allowed: a directory, {allowed}")
    ids = served.tokenizer.encode(bundled_text(), add_special_tokens=False).ids[:PRIOR_TOKENS]
    tokens = torch.tensor([ids], device=served.device)
    return Routing(StaticRouter(measure_prior(served.loaded.model, tokens, indicator), router))
