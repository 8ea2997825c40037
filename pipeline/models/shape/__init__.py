"""A model's size from its config.json, before a weight is read: every tensor's name and shape."""

from pipeline.models.shape.families import FAMILIES, shape_of
from pipeline.models.shape.model import EXPERTS, Layer, Shape

__all__ = ["EXPERTS", "FAMILIES", "Layer", "Shape", "shape_of"]
