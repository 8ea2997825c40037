"""How layers and the loss are compiled with ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"  # of torch.compile; tests that compare numbers use one that compiles no C++


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles layers one by one. They share compiled variants: frozen or not, reached by gradients or not."""
    torch._dynamo.config.recompile_limit = 32  # all layers count towards it, in training and in evaluation
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise dynamo would silently fall back to eager
    # Routers store what they observe (see Routing). Recomputing a layer need not store it again.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in layers:
        layer.compile(dynamic=False, backend=BACKEND)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled for tensors of any size."""
    return torch.compile(function, dynamic=True, backend=BACKEND)
