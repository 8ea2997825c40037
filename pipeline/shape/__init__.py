"""A model's size from its config.json, before a weight is read: every tensor's name and shape."""

from pipeline.shape.families import FAMILIES, shape_of
from pipeline.shape.model import Layer, Shape

__all__ = ["FAMILIES", "Layer", "Shape", "shape_of"]
