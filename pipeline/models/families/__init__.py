"""Model families as data: one row of ``table.py`` per family describes everything that depends on it.

Expansion methods see a layer as ``[out, in]`` matrices, biases, norms and a few others, each with a role, and never ask
for the name of a family. Fused projections and stacked experts are split (``Fused``, ``Place``) before a method sees
them, and joined again when its tensors are written. The plan takes the shape of every tensor from the same rows.
"""

from pipeline.models.families.family import Family
from pipeline.models.families.inferred import INFERRED, family_for
from pipeline.models.families.nested import inner_config, prefix_of
from pipeline.models.families.parameters import Fused, LinearMap, Parameter, expert_share, head_size, num_experts
from pipeline.models.families.shapes import (
    LayerShape,
    Shape,
    check_stored,
    shape_of,
    weights_disagree,
)
from pipeline.models.families.table import FAMILIES, family_of
from pipeline.models.families.tensors import LayerTensor, Place, Role

__all__ = [
    "FAMILIES", "INFERRED", "Family", "Fused", "LayerShape", "LayerTensor", "LinearMap", "Parameter", "Place",
    "Role", "Shape", "check_stored", "expert_share", "family_for", "family_of", "head_size", "inner_config",
    "num_experts", "prefix_of", "shape_of", "weights_disagree",
]  # fmt: skip
