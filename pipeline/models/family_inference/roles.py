"""What the parameters of one decoder layer do, from its modules, their shapes and what silences the layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from pipeline.models.families.tensors import Block, Kind, Role, Side
from pipeline.models.family_inference.decoder import LayerCall, Step, filled
from pipeline.models.family_inference.silence import Silence, is_norm, norm_offset

MIXES_TOKENS = re.compile(
    r"att|mixer|mamba|conv|temporal|ssm|lstm|retention|time_mix|recurrent|kda|delta", re.IGNORECASE
)
IS_MLP = re.compile(r"mlp|moe|ffn|ff\b|feed_?forward|expert|\bfc|dense_4?h_to", re.IGNORECASE)
IS_ROUTER = re.compile(r"router|gate|switch|\bwg\b", re.IGNORECASE)
NAMES: tuple[tuple[str, str], ...] = (  # of matrices, by the last part of their module's name
    ("q", r"w?q(uery)?(_proj)?|q_proj|query"),
    ("k", r"w?k(ey)?(_proj)?|k_proj|key"),
    ("v", r"w?v(alue)?(_proj)?|v_proj|value"),
    ("gate", r"gate(_proj)?|w1|proj_up_gate|w_0|wi_0"),
    ("up", r"up(_proj)?|w3|proj_up|w_1|wi_1|fc1|fc_in|c_fc|dense_h_to_4h"),
)


@dataclass(frozen=True)
class LayerParts:
    """The parameters of a layer, with its trace and what silences it.

    Attributes:
        tensors: parameters and saved buffers by name.
        silence: None if nothing silences the layer.
        hidden: the size of the residual stream.
        experts: experts per layer; 0 in a dense model.
    """

    call: LayerCall
    steps: list[Step]
    tensors: Mapping[str, Tensor]
    silence: Silence | None
    hidden: int
    experts: int

    # ------------------------------------------------------------------------------------------- modules

    def module(self, name: str) -> nn.Module:
        """Returns the module that a parameter belongs to."""
        return self.call.layer.get_submodule(name.rpartition(".")[0])

    @cached_property
    def step_of(self) -> dict[str, Step]:
        """The last call of every module that is called."""
        return {step.name: step for step in self.steps}

    def block(self, name: str) -> Block:
        """Returns the residual block of a parameter that belongs to a module of attention or of an MLP."""
        module, path = self.call.layer, []
        for part in name.split(".")[:-1]:
            module = module.get_submodule(part)
            path.append((part, type(module).__name__))
        # The module next to the layer says most, and its own name more than that of its class.
        for part, class_name in path:
            for text in (part, class_name):
                if part != "mixer" or text != part:  # a mixer may be an MLP
                    if IS_MLP.search(text):
                        return "mlp"
                    if MIXES_TOKENS.search(text):
                        return "attention"
        return "mlp" if path and path[0][0] != "mixer" else "attention"

    # --------------------------------------------------------------------------------------------- roles

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The complete role of every tensor, in which no fused projection is split."""
        return {name: self._role(name) for name in self.tensors}

    def _role(self, name: str) -> Role:
        if is_norm(self.module(name)):
            return self._norm(name)
        kind, block = self._kind(name), self.block(name)
        side = self._side(name, kind)
        return Role(
            self._matrix_name(name, block, side) if kind in ("matrix", "bias") else self._other_name(name, kind),
            kind, block, side, self._silent(name), 0.0, self._after_attention(block, side),
        )  # fmt: skip

    def _silent(self, name: str) -> float | None:
        return None if self.silence is None else self.silence.values.get(name)

    def _kind(self, name: str) -> Kind:
        tensor, module = self.tensors[name], self.module(name)
        own, class_name = name.rpartition(".")[2], type(module).__name__
        if name not in self._parameters:
            return "router" if IS_ROUTER.search(name) else "other"
        if self._is_router(name):
            return "router"
        if isinstance(module, nn.Linear) or "Linear" in class_name or class_name == "Conv1D":
            return "matrix" if tensor.dim() >= 2 else "bias"
        if (tensor.dim() == 3 and tensor.shape[0] == self.experts) or (tensor.dim() == 2 and own == "weight"):
            return "other" if isinstance(module, nn.Embedding) else "matrix"
        if own.endswith("bias") and (tensor.dim() == 1 or tensor.shape[0] == self.experts) and self._is_needed(name):
            return "bias"
        if own.endswith("proj_bias"):
            return "bias"
        return "sink" if own == "sinks" else "other"

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.call.layer.named_parameters()}

    def _is_needed(self, name: str) -> bool:
        return self.silence is not None and name in self.silence.values

    def _is_router(self, name: str) -> bool:
        """Returns whether a tensor chooses experts, or weights the shared ones."""
        if not self.experts or not IS_ROUTER.search(name) or self.block(name) != "mlp":
            return False
        weight = self.tensors[name]
        reads_hidden = weight.dim() == 2 and weight.shape[1] == self.hidden
        return (weight.dim() == 1 or reads_hidden) and weight.shape[0] in (self.experts, 1)

    def _side(self, name: str, kind: Kind) -> Side:
        if self._writes(name):
            return "output"
        if kind == "bias":
            matrix = f"{name.rpartition('.')[0]}.weight" if name.endswith(".bias") else name.removesuffix("_bias")
            return self._side(matrix, "matrix") if matrix in self.tensors else "inner"
        if kind == "router":
            return "input"
        return "input" if kind == "matrix" and self.hidden in self.tensors[name].shape[-2:] else "inner"

    def _writes(self, name: str) -> bool:
        if self.silence is not None:
            return name in self.silence.writers
        return name in self._last_of_blocks

    @cached_property
    def _last_of_blocks(self) -> set[str]:
        """For a layer that nothing silences: the last linear map of each block that returns the hidden size."""
        last: dict[str, str] = {}
        for step in self.steps:
            name = f"{step.name}.weight"
            is_matrix = name in self.tensors and self.tensors[name].dim() == 2 and not self._is_router(name)
            if is_matrix and step.output is not None and step.output.shape[-1] == self.hidden:
                last[self.block(name)] = step.name
        for name, tensor in self.tensors.items():  # experts are not called one by one
            if tensor.dim() == 3 and "down" in name:
                last["mlp"] = name
        return {f"{module}.{own}" for module in last.values() for own in ("weight", "bias")} | set(last.values())

    def _after_attention(self, block: Block, side: Side) -> bool:
        return (block, side) == ("mlp", "input") and not self.is_parallel

    @cached_property
    def is_parallel(self) -> bool:
        """Whether the MLP does not read what the layer's own attention adds."""
        if self.silence is None:
            return False
        silent = {
            name: value
            for name, value in self.silence.values.items()
            if (self._norm_block(name) if is_norm(self.module(name)) else self.block(name)) == "attention"
        }
        parameters = dict(self.call.layer.named_parameters())
        readers = [step.name for step in self.steps if self._reads_as_mlp(step)]
        if not readers or not silent:
            return False
        with filled(silent, parameters):
            steps = {step.name: step for step in self.call.trace()}
        before, after = (place[readers[0]].input for place in (self.step_of, steps))
        return before is not None and after is not None and bool((before == after).all())

    def _reads_as_mlp(self, step: Step) -> bool:
        name = f"{step.name}.weight"
        child = step.name and "." not in step.name and not is_norm(step.module)
        has_parameters = any(other.startswith(f"{step.name}.") for other in self.tensors)
        return bool(child) and has_parameters and self.block(name) == "mlp"

    # --------------------------------------------------------------------------------------------- norms

    def _norm(self, name: str) -> Role:
        module = name.rpartition(".")[0]
        step = self.step_of.get(module)
        offset = 0.0 if step is None or name.endswith("bias") else norm_offset(step)
        block = self._norm_block(name)
        if self._is_needed(name) or f"{module}.weight" in (self.silence.values if self.silence else {}):
            role, side = f"{block}_output_norm", "output"
        elif self._is_at_layer_level(module) and self.tensors[name].numel() == self.hidden:
            role, side = ("input_norm" if block == "attention" else "post_attention_norm"), "input"
        else:
            role, side = self._inner_norm_name(module), "inner"
        after = self._after_attention(block, side)  # type: ignore[arg-type]
        return Role(role, "norm", block, side, self._silent(name), offset, after)  # type: ignore[arg-type]

    def _is_at_layer_level(self, module: str) -> bool:
        if "." not in module:
            return True
        step = self.step_of.get(module)  # or it is the first module inside a block, and reads the block's input
        parent = self.step_of.get(module.rpartition(".")[0])
        return (
            step is not None and parent is not None and parent.input is step.input and not MIXES_TOKENS.search(module)
        )

    def _norm_block(self, name: str) -> Block:
        module = name.rpartition(".")[0]
        if "." in module:
            return self.block(name)
        step = self.step_of.get(module)
        if step is None:
            return "attention"
        number = self.steps.index(step)
        children = [
            (other, self.block(f"{other.name}.weight"))
            for other in self.steps
            if other.name and "." not in other.name and not is_norm(other.module)
            and any(tensor.startswith(f"{other.name}.") for tensor in self.tensors)
        ]  # fmt: skip
        if self._is_needed(name):
            before = [block for other, block in children if self.steps.index(other) < number]
            return before[-1] if before else "attention"
        readers = [block for other, block in children if other.input is step.output]
        after = [block for other, block in children if self.steps.index(other) > number]
        return "attention" if "attention" in readers else readers[0] if readers else after[0] if after else "mlp"

    @staticmethod
    def _inner_norm_name(module: str) -> str:
        last = re.sub(r"(_?layer_?norm|_?norm)$", "", re.sub(r"\.norms\.\d+", "", module).rpartition(".")[2])
        return f"{last}_norm" if last else "inner_norm"

    # --------------------------------------------------------------------------------------------- names

    def _matrix_name(self, name: str, block: Block, side: Side) -> str:
        if side == "output":
            return "o" if block == "attention" else "down"
        module, _, own = name.rpartition(".")
        last = (own.removesuffix("_bias") if own not in ("weight", "bias") else module.rpartition(".")[2]).lower()
        known = next((role for role, pattern in NAMES if re.fullmatch(pattern, last)), None)
        if known in ("q", "k", "v") and block == "attention":
            return known
        if block == "mlp" and side == "input":
            return known if known in ("gate", "up") else self._mlp_input_name(module, last)
        return last.removesuffix("_proj")

    def _mlp_input_name(self, module: str, last: str) -> str:
        """The role of an MLP's input projection with an unusual name."""
        parent = module.rpartition(".")[0]
        siblings = [
            other for other in self.tensors
            if other.endswith(".weight") and other.rpartition(".")[0].rpartition(".")[0] == parent
            and self.tensors[other].dim() == 2 and other not in self._writers
        ]  # fmt: skip
        return "up" if len(siblings) == 1 else last.removesuffix("_proj")

    @cached_property
    def _writers(self) -> frozenset[str]:
        return frozenset() if self.silence is None else self.silence.writers

    def _other_name(self, name: str, kind: Kind) -> str:
        if kind == "router":
            return "shared_expert_gate" if self.tensors[name].shape[0] == 1 and self.experts > 1 else "router"
        if kind == "sink":
            return "sinks"
        module, _, own = name.rpartition(".")
        return module.rpartition(".")[2] if own in ("weight", "bias") else own
