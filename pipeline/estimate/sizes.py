"""The model before and after, and what of it trains."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import AnyExpand, Train
from pipeline.estimate.trained import Trained, trained_part
from pipeline.expansion.layer_plan import LayerPlan, make_plan
from pipeline.shape import Shape


@dataclass(frozen=True)
class Sizes:
    """A base and the model that ``expand`` will make of it."""

    base: Shape
    grown: Shape
    layers: LayerPlan
    method: str

    def trained(self, section: str, train: Train) -> Trained:
        """What a training section chooses in the deeper model.

        Raises:
            UserError: nothing would train.
        """
        expansion = {"method": self.method, "layers": self.layers.to_json()}
        return trained_part(section, train.trainable, self.grown, expansion)


def sizes_of(expand: AnyExpand, base: Shape) -> Sizes:
    """Both models' sizes.

    Raises:
        UserError: the base cannot be expanded so.
    """
    layers = make_plan(expand, len(base.layers))
    return Sizes(base, base.with_layers(layers.config_sources), layers, expand.method)
