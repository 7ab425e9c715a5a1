"""Artifacts of any kind: what chooses the paths, and the decoder that runs them."""

from pathlib import Path

from buddy_routing.artifact import load_duo, load_exits, load_router
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.duo import DuoRouter
from buddy_routing.exits import ExitRouter
from buddy_routing.router import LearnedRouter, Router
from buddy_routing.router_config import read_kind


def load_path_source(
    directory: Path, model: RoutedDecoder, base_fingerprint: str
) -> tuple[LearnedRouter | ExitRouter, int]:
    """The router or the exits of an artifact for `model`, and its route block. Raises ArtifactError."""
    match read_kind(directory):
        case "exits":
            exits, exits_config = load_exits(directory, model, base_fingerprint)
            return exits, exits_config.route_block
        case "duo":
            duo, duo_config = load_duo(directory, model, base_fingerprint)
            return duo, duo_config.route_block
        case "router":
            router, config = load_router(directory, base_fingerprint, model.inv_freq.device)
            return router, config.route_block


def decoder_for(model: RoutedDecoder, source: Router | ExitRouter) -> RoutedDecoder:
    """The decoder that can run a source's paths: with its exits or small FFNs, if it has any."""
    if isinstance(source, ExitRouter):
        return model.with_exits(source.exits)
    if isinstance(source, DuoRouter):
        return model.with_small_ffns(source.small_ffns)
    return model
