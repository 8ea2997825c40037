"""One table row a model family: which tensor of a layer plays which role, and how tensors are packed on disk.

Everything that depends on a family stands in ``table.py``. Methods see a layer as ``[out, in]`` matrices, biases,
norms and a few others, each with a role, and never ask for a family's name: fused projections and stacked experts are
taken apart (``Fused``, ``Place``) before a method sees them, and put together again when its tensors are written.
"""

from pipeline.models.families.family import Architecture, Fused, num_experts
from pipeline.models.families.table import ARCHITECTURES, architecture_of
from pipeline.models.families.tensors import LayerTensor, Place, Role

__all__ = ["ARCHITECTURES", "Architecture", "Fused", "LayerTensor", "Place", "Role", "architecture_of", "num_experts"]
