"""The routers of mixtures of experts in training: their load-balancing loss, and what is logged about them.

The loss is that of the Switch Transformer (arXiv 2101.03961, equations 4 to 6) with k experts per token, scaled as in
transformers: in one layer and one sequence of n real tokens, with E experts,

    E · Σ_e f_e · P_e,    f_e = assignments to expert e / n,    P_e = mean probability of expert e

which is k if all experts are used evenly. transformers takes f and P over a micro-batch and over all layers together.
Here they are taken over one sequence and one layer, and the loss of a step is the mean over the real tokens of the
global batch and over the layers whose router trains. The gradients then do not depend on the number of ranks and the
micro-batch, which are not part of a result's key, and layers cannot make up for each other. DeepSeek-V2 and V3 call it
the sequence-wise balance loss (arXiv 2412.19437, section 2.1.2).

The loss is computed inside its layer, and its gradient is added to that of the router's weights of the experts, as in
Megatron-LM. It therefore works with activation checkpointing, which computes the layer twice.

Shape suffixes: B sequences of a micro-batch, S sequence length, T = B·S tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.training.sequence_parallel import ALONE, SequenceGroup

# Names of the weight of the loss in configs.
AUX_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha")
# A router has collapsed if the busiest k experts got at least ``COLLAPSED_SHARE`` of the assignments in each of
# ``COLLAPSED_STEPS`` consecutive steps, k being the number of experts per token. If they got all of them, no other
# expert would be trained. In an even distribution they get k / E.
COLLAPSED_SHARE = 0.95
COLLAPSED_STEPS = 16


def coefficient_of(setting: float | None, config: Any) -> float:
    """Returns the weight of the load-balancing loss: the setting, or else the entry of the model's config, or 0."""
    if setting is not None:
        return setting
    found = (getattr(config, name, None) for name in AUX_LOSS_COEFFICIENTS)
    return next((float(value) for value in found if isinstance(value, int | float)), 0.0)


def routers_of(model: PreTrainedModel, layers: nn.ModuleList) -> dict[int, nn.Module]:
    """Returns the routers of the layers that have one, by layer, as far as transformers records what they return.

    These return logits [T, E], weights [T, K] and the chosen experts [T, K].
    """
    recorder = (getattr(type(model), "_can_record_outputs", None) or {}).get("router_logits")
    target = getattr(recorder, "target_class", None)
    if target is None or getattr(recorder, "index", None) != 0:
        return {}
    return {
        index: module
        for index, layer in enumerate(layers)
        for module in layer.modules()
        if isinstance(module, target)
    }  # fmt: skip


@dataclass(frozen=True)
class RouterStatistics:
    """What one router did in one step, over the real tokens of the global batch.

    Attributes:
        assignments: of every expert; the sum is the number of tokens times the number of experts per token.
        tokens: real tokens.
        entropy: the mean entropy of the router's probabilities for one token, as a fraction of the largest, log E.
    """

    assignments: list[float]
    tokens: float
    entropy: float

    @property
    def load(self) -> list[float]:
        """Assignments of every expert relative to an even distribution: 1 for all if the router is balanced."""
        total = max(1.0, sum(self.assignments))
        return [count * len(self.assignments) / total for count in self.assignments]

    @property
    def is_concentrated(self) -> bool:
        """Whether almost all assignments are to as few experts as possible, see ``COLLAPSED_SHARE``."""
        total = sum(self.assignments)
        per_token = round(total / max(1.0, self.tokens))
        busiest = sum(sorted(self.assignments)[len(self.assignments) - per_token :])
        return 0 < per_token < len(self.assignments) and busiest >= COLLAPSED_SHARE * total


class Routing:
    """Observes the routers of a model in training mode, and adds the gradient of their load-balancing loss.

    Args:
        routers: of the layers that have one, by layer.
        coefficient: the weight of the loss.
        reported: the layers to log.
        sequence: the ranks that share sequences with this one.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        coefficient: float,
        reported: Collection[int],
        sequence: SequenceGroup = ALONE,
    ) -> None:
        self.coefficient = coefficient
        self._sequence = sequence
        self._trained = [layer for layer, router in routers.items() if _trains(router)]
        self._reported = [layer for layer in routers if layer in reported]
        self._observed = [layer for layer in routers if layer in {*self._trained, *self._reported}]
        self._routers = dict(routers)
        self._mask = torch.ones(0)  # [B, S]
        self._scale = torch.zeros(())
        for layer in self._observed:
            router: Any = routers[layer]
            router.routing, router.observed = self, None
            router.is_balanced = coefficient > 0 and layer in self._trained
            router.register_forward_hook(_observe)

    @property
    def has_loss(self) -> bool:
        """Whether a router trains, so that there is a load-balancing loss."""
        return bool(self._trained)

    def prepare(self, real: Tensor, factor: Tensor) -> None:
        """Sets what the next forward pass needs.

        Args:
            real: [B, S], False for padding.
            factor: of the summed loss of all tokens, by which it becomes a mean over the global batch.
        """
        self._mask = real.float()
        self._scale = (self.coefficient / max(1, len(self._trained)) * factor).float()

    def observed(self) -> Tensor:
        """Returns what was observed in the last forward pass: sums over its real tokens, to be added up, in float64."""
        return torch.cat([self._routers[layer].observed for layer in self._observed]).double()  # type: ignore[misc]

    def loss(self, sums: list[float], tokens: float) -> float:
        """Returns the mean loss of the trained routers, without its coefficient.

        Args:
            sums: those of ``observed`` over a step.
            tokens: real tokens of the step.
        """
        rows = self._rows(sums)
        return sum(rows[layer][-1] for layer in self._trained) / max(1.0, tokens) / max(1, len(self._trained))

    def statistics(self, sums: list[float], tokens: float) -> dict[int, RouterStatistics]:
        """Returns what the reported routers did in a step, by layer; see ``loss`` for the arguments."""
        rows = self._rows(sums)
        return {
            layer: RouterStatistics(counts, tokens, entropy / max(1.0, tokens) / math.log(max(2, len(counts))))
            for layer in self._reported
            for *counts, entropy, _ in [rows[layer]]
        }

    def _rows(self, sums: list[float]) -> dict[int, list[float]]:
        size = len(sums) // max(1, len(self._observed))
        return {layer: sums[index * size : (index + 1) * size] for index, layer in enumerate(self._observed)}

    def observe(self, router: Any, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Stores the sums of a forward pass, and returns the weights with the gradient of the loss attached.

        The sums [E + 2] are the assignments of all experts, the entropy, and the loss.
        """
        mask_BS = self._mask
        batch, experts = mask_BS.shape[0], logits_TE.shape[-1]
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        assigned = mask_BS.repeat_interleave(experts_TK.shape[-1], dim=1)
        counts_BE = assigned.new_zeros(batch, experts).scatter_add_(1, experts_TK.reshape(batch, -1), assigned)
        sums_BE = (probabilities_TE.reshape(batch, -1, experts) * mask_BS[..., None]).sum(dim=1)
        # f is that of the whole sequence. P is a sum over tokens, and so are the loss and its gradient.
        of_sequence = self._sequence.sum(torch.cat([counts_BE, mask_BS.sum(dim=1, keepdim=True)], dim=1))
        loss = experts * (of_sequence[:, :-1] * sums_BE / of_sequence[:, -1:].clamp(min=1.0)).sum()
        with torch.no_grad():
            entropy = torch.special.entr(probabilities_TE).sum(dim=-1) @ mask_BS.flatten()
            router.observed = torch.cat([counts_BE.sum(dim=0), entropy[None], loss.detach()[None]])
        return _WithGradientOf.apply(weights_TK, loss * self._scale) if router.is_balanced else weights_TK


def _trains(router: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in router.parameters())


def _observe(router: Any, arguments: Any, output: Any) -> Any:
    """The forward hook of all routers, the same function for all of them so that compiled layers share their code."""
    if not router.training:
        return None
    logits, weights, experts, *others = output
    return (logits, router.routing.observe(router, logits, weights, experts), experts, *others)


class _WithGradientOf(torch.autograd.Function):
    """Passes on its first argument, and in the backward pass gives the second one, a loss, the gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)
