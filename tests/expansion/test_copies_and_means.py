"""Methods without linear algebra: exact copies, means, and blocks that add zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.config import AnyExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import Workspace, method_of
from pipeline.models.families import LayerTensor, Role, family_of
from tests.expansion.random_layer import Layers

ExpandSettings = Callable[..., AnyExpand]
RandomLayers = Callable[[int], Layers]


def _expand(base: Layers, settings: AnyExpand) -> tuple[LayerPlan, dict[int, dict[LayerTensor, Tensor]]]:
    """Returns the plan, and the new layers' tensors by index in the new model."""
    method = method_of(settings)
    plan = method.place(len(base))
    made: dict[int, dict[LayerTensor, Tensor]] = {layer.layer: {} for layer in plan.new_layers}
    for layer, tensor, value in method.new_tensors(base, plan, Workspace()):
        assert tensor not in made[layer]
        made[layer][tensor] = value
    assert all(set(tensors) == set(base[0]) for tensors in made.values())
    return plan, made


@pytest.mark.parametrize("method", ["copy", "solar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_exact(
    expand_settings: ExpandSettings, random_layers: RandomLayers, method: str, dtype: torch.dtype
) -> None:
    base = [{tensor: value.to(dtype) for tensor, value in layer.items()} for layer in random_layers(4)]
    base[2] = {tensor: value * 1e-6 for tensor, value in base[2].items()}  # subnormal in float16
    plan, made = _expand(base, expand_settings(method, new_layers=3))
    for layer, tensors in made.items():
        source = plan.layers[layer].base[0]
        assert all(value.dtype == dtype and torch.equal(value, base[source][t]) for t, value in tensors.items())


def _is_output(role: Role) -> bool:
    return role.name in ("o", "down")


def test_llama_pro_copies_all_but_zeroed_outputs_and_their_biases(
    expand_settings: ExpandSettings, random_layers: RandomLayers
) -> None:
    base = random_layers(4)
    plan, made = _expand(base, expand_settings("llama_pro", new_layers=5, position="interleaved"))
    for layer, tensors in made.items():
        for tensor, value in tensors.items():
            if _is_output(tensor.role):
                assert not value.any()
            else:
                assert torch.equal(value, base[plan.layers[layer].base[0]][tensor])


@pytest.mark.parametrize("method", ["copy", "llama_pro"])
@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_output_scale_multiplies_what_copies_add_to_the_residual_stream(
    expand_settings: ExpandSettings, random_layers: RandomLayers, method: str, scale: float
) -> None:
    base = random_layers(4)
    plan, made = _expand(base, expand_settings(method, new_layers=3, position=[0, 2, 2], output_scale=scale))
    for layer, tensors in made.items():
        for tensor, value in tensors.items():
            source = base[plan.layers[layer].base[0]][tensor]
            assert torch.equal(value, source * scale if _is_output(tensor.role) else source)


def test_output_scale_scales_output_norms_with_their_offset(expand_settings: ExpandSettings) -> None:
    """A Gemma 2 norm multiplies by 1 + w, and the projection before it stays as it is."""
    roles, generator = family_of("gemma2").roles, torch.Generator().manual_seed(0)
    names = ("self_attn.o_proj.weight", "post_attention_layernorm.weight", "input_layernorm.weight")
    base = [{LayerTensor(name, roles[name]): torch.randn(4, generator=generator) for name in names}]
    settings = expand_settings("copy", new_layers=1, position=[0], output_scale=0.25)
    _, made = _expand(base, settings)
    before, after = ({tensor.name: value for tensor, value in layer.items()} for layer in (base[0], made[1]))
    torch.testing.assert_close(1 + after[names[1]], 0.25 * (1 + before[names[1]]))
    assert all(torch.equal(after[name], before[name]) for name in (names[0], names[2]))


@pytest.mark.parametrize("position", [[1, 1, 1], "top"])
def test_average_with_zeroed_outputs_differs_only_there(
    expand_settings: ExpandSettings, random_layers: RandomLayers, position: object
) -> None:
    base = random_layers(4)
    (_, plain), (_, zeroed) = (
        _expand(base, expand_settings("average", new_layers=3, position=position, zero_init=zero))
        for zero in (False, True)
    )
    for layer, tensors in zeroed.items():
        for tensor, value in tensors.items():
            expected = torch.zeros_like(value) if _is_output(tensor.role) else plain[layer][tensor]
            assert torch.equal(value, expected)


def test_average_is_the_mean_of_the_neighbors(expand_settings: ExpandSettings, random_layers: RandomLayers) -> None:
    base = random_layers(4)
    _, made = _expand(base, expand_settings("average", new_layers=2, position=[1, 3]))
    for tensor in base[0]:
        assert torch.equal(made[2][tensor], (base[1][tensor] + base[2][tensor]) / 2)
        assert torch.equal(made[5][tensor], base[3][tensor])  # after the last layer: its mean with itself


def test_three_averages_in_a_gap_are_at_its_quarters(
    expand_settings: ExpandSettings, random_layers: RandomLayers
) -> None:
    base = random_layers(2)
    _, made = _expand(base, expand_settings("average", new_layers=3, position=[0, 0, 0]))
    for tensor, lower in base[0].items():
        for layer in (1, 2, 3):
            torch.testing.assert_close(made[layer][tensor], torch.lerp(lower, base[1][tensor], layer / 4))


def test_none_adds_no_tensors(expand_settings: ExpandSettings, random_layers: RandomLayers) -> None:
    _, made = _expand(random_layers(3), expand_settings("none"))
    assert made == {}
