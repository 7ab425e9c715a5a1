"""The Budget Predictor at work: how deep to run a prompt whose request leaves it open."""

from dataclasses import dataclass

import torch

from buddy_routing.decoder import RoutedDecoder
from buddy_routing.features import causal_features
from buddy_routing.predictor import BudgetPredictor


@dataclass(frozen=True, slots=True)
class DepthPredictor:
    """`cost_weight` as in BudgetPredictor.choose. Reads the model's weights alone, so any thread may ask."""

    model: RoutedDecoder
    predictor: BudgetPredictor
    cost_weight: float = 0.0

    @torch.inference_mode()
    def choose(self, prompt_tokens: tuple[int, ...], lowest: int, highest: int) -> int:
        """Layers to run, from `lowest` to `highest`."""
        tokens = torch.tensor([prompt_tokens], device=self.model.inv_freq.device)
        features = causal_features(self.model.first_layer_v(tokens))[:, -1]
        return int(self.predictor.choose(features, lowest, highest, self.cost_weight))
