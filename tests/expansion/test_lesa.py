"""LESA against a full SVD and a plain training loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config import AnyExpand
from pipeline.expansion import lesa_predictions
from pipeline.expansion.layer_plan import LayerPlan, insertion_plan
from pipeline.expansion.lesa_predictor import (
    Predictor,
    _batch_loss,
    _learning_rate_factor,
    prediction_loss,
    train_predictor,
)
from pipeline.expansion.method import Workspace, seed_for
from pipeline.expansion.methods.lesa import Lesa
from pipeline.expansion.svd import SharedSVD, decompose
from pipeline.models.families import LayerTensor, family_of
from tests.expansion.random_layer import Layers
from tests.naive import predicted_matrix, svd_factors

ExpandSettings = Callable[..., AnyExpand]
RandomLayers = Callable[[int], Layers]


@pytest.fixture
def settings(expand_settings: ExpandSettings) -> Callable[..., Lesa]:
    """Returns LESA's settings, with small sizes."""

    def make(**changes: object) -> Lesa:
        small = {"epochs": 2, "hidden_size": 16, "new_layers": 2, "batch_size": 8}
        made = expand_settings("lesa", **{**small, **changes})
        assert isinstance(made, Lesa)
        return made

    return make


def _expand(
    base: Layers, settings: Lesa, seed: int = 0
) -> tuple[LayerPlan, dict[int, dict[LayerTensor, Tensor]], Workspace]:
    plan, work = settings.place(len(base)), Workspace(declared_seed=seed)
    made: dict[int, dict[LayerTensor, Tensor]] = {layer.layer: {} for layer in plan.new_layers}
    for layer, tensor, value in settings.new_tensors(base, plan, work):
        assert tensor not in made[layer]
        made[layer][tensor] = value
    assert all(set(tensors) == set(base[0]) for tensors in made.values())
    return plan, made, work


def _ignore_progress(step: int, steps: int, loss: float) -> None:
    pass


def _matrices(base: Layers, name: str) -> list[Tensor]:
    return [next(value for tensor, value in layer.items() if tensor.name == name) for layer in base]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (24, 4)], ids=["tall", "wide", "taller than all side by side"])
def test_the_decomposition_equals_a_full_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for _ in range(4)]
    svd = decompose(lambda layer: matrices[layer], 4)
    left, values, right = svd_factors(matrices)
    assert svd.rank == min(shape[0], 4 * shape[1])
    torch.testing.assert_close(svd.left.double(), left * values, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(svd.right, right, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    for layer in range(4):
        torch.testing.assert_close(svd.left @ svd.right[layer], matrices[layer], atol=1e-5, rtol=1e-5)


def test_directions_with_a_zero_singular_value_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 3, generator=generator)
    matrices = [basis @ torch.randn(3, 5, generator=generator) for _ in range(4)]
    svd = decompose(lambda layer: matrices[layer], 4)
    assert svd.rank == 3
    assert torch.isfinite(svd.right).all()
    torch.testing.assert_close(svd.left @ svd.right[1], matrices[1], atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_authors() -> None:
    predicted, target = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    mean_squared_error, norm_error = (9 + 9) / 4, (5.0 - 1.0) ** 2
    loss = prediction_loss(predicted, target, norm_loss_weight=0.1, norm_batch=64)
    torch.testing.assert_close(loss, torch.tensor(0.9 * mean_squared_error + 0.1 * norm_error))


def test_norms_do_not_depend_on_the_number_of_directions_per_step() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(10, 3, generator=generator), torch.randn(10, 3, generator=generator)
    batches = list(zip(predicted.split(4), target.split(4), strict=True))
    norm_error = sum((p.norm() - t.norm()) ** 2 for p, t in batches) / len(batches)
    wanted = 0.9 * (predicted - target).square().mean() + 0.1 * norm_error
    torch.testing.assert_close(prediction_loss(predicted, target, 0.1, norm_batch=4), wanted)


@pytest.mark.parametrize(("variant", "norm_loss_weight"), [("reference", 5e-4), ("paper", 5e-5)])
def test_training_equals_a_plain_loop_over_all_samples(
    settings: Callable[..., Lesa], variant: str, norm_loss_weight: float
) -> None:
    """As the authors do: one norm per batch, and a constant learning rate."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(5, 6, 3, generator=generator)
    chosen = settings(variant=variant, epochs=3)
    predictor = Predictor(3, 16, seed=1)
    naive = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    naive.load_state_dict(predictor.state_dict())
    train_predictor(predictor, right, chosen, seed=2, note=_ignore_progress)

    inputs = torch.cat([torch.cat([right[i - 1], right[i + 1]], dim=1) for i in (1, 2, 3)])
    targets = torch.cat([right[i] for i in (1, 2, 3)])
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-3, weight_decay=0.01)
    order_generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        order = torch.randperm(len(inputs), generator=order_generator)
        for batch in order.split(8):
            output = naive(inputs[batch])
            loss = (1 - norm_loss_weight) * (output - targets[batch]).pow(2).mean()
            loss = loss + norm_loss_weight * (output.norm() - targets[batch].norm()).pow(2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for got, wanted in zip(predictor.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_standardized_factors_have_unit_variance_and_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(6, 9, generator=generator) for _ in range(4)]
    svd = decompose(lambda layer: matrices[layer], 4, standardized=True)
    variances = svd.right.square().mean(dim=(0, 2))
    torch.testing.assert_close(variances, torch.ones(6), atol=1e-4, rtol=1e-4)
    for layer in range(4):
        torch.testing.assert_close(svd.left @ svd.right[layer], matrices[layer], atol=1e-5, rtol=1e-5)


def test_first_predictions_are_centered_and_have_the_norm_of_the_targets() -> None:
    right = torch.randn(5, 40, 12, generator=torch.Generator().manual_seed(0))
    predictor = Predictor(12, 32, seed=0)
    predictor.initialize_on(right.flatten(0, 1), 40, torch.arange(40, 160), seed=1)
    with torch.no_grad():
        first = predictor(torch.cat([right[:-2], right[2:]], dim=2)).flatten(0, 1)
    torch.testing.assert_close(first.mean(dim=0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.norm(), right[1:-1].norm(), rtol=1e-5, atol=0)


def test_training_reduces_the_loss(settings: Callable[..., Lesa]) -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(64, 8, generator=generator)
    right = torch.stack([direction * (1 + 0.1 * layer) for layer in range(6)])
    losses: list[float] = []
    train_predictor(
        Predictor(8, 32, seed=0), right, settings(epochs=30), seed=0, note=lambda step, steps, loss: losses.append(loss)
    )
    assert losses[-1] < losses[0] / 20


@pytest.mark.parametrize("variant", ["fast", "reference"])
def test_new_matrices_are_predicted_from_an_exact_svd(
    settings: Callable[..., Lesa], random_layers: RandomLayers, variant: str
) -> None:
    base, chosen = random_layers(5), settings(position=[1, 4], variant=variant)
    _, made, _ = _expand(base, chosen)
    for name in ("self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
        tensor = LayerTensor(name, family_of("llama").roles[name])
        predictor = Predictor(base[0][tensor].shape[1], 16, seed_for(0, name))
        svd = decompose(lambda layer: base[layer][tensor], 5, standardized=chosen.standardized)  # noqa: B023
        train_predictor(predictor, svd.right, chosen, seed_for(0, name), note=_ignore_progress)
        linears = [(module.weight, module.bias) for module in predictor if isinstance(module, nn.Linear)]
        matrices = _matrices(base, name)
        for layer, (lower, upper) in {2: (1, 2), 6: (4, 4)}.items():
            scale = math.sqrt(5 * matrices[0].shape[1]) if variant == "fast" else 1.0
            wanted = predicted_matrix(matrices, lower, upper, linears, scale)
            torch.testing.assert_close(made[layer][tensor].double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_second_layer_in_a_gap_is_predicted_from_the_first(
    settings: Callable[..., Lesa], random_layers: RandomLayers
) -> None:
    base, chosen = random_layers(4), settings(position=[1, 1], variant="reference")
    _, made, _ = _expand(base, chosen)
    name = "self_attn.q_proj.weight"
    tensor = LayerTensor(name, family_of("llama").roles[name])
    predictor = Predictor(base[0][tensor].shape[1], 16, seed_for(0, name))
    svd = decompose(lambda layer: base[layer][tensor], 4)
    train_predictor(predictor, svd.right, chosen, seed_for(0, name), note=_ignore_progress)
    first = predictor(torch.cat([svd.right[1], svd.right[2]], dim=1))
    second = predictor(torch.cat([first, svd.right[2]], dim=1))
    torch.testing.assert_close(made[2][tensor], (svd.left @ first).detach())
    torch.testing.assert_close(made[3][tensor], (svd.left @ second).detach())


@pytest.mark.parametrize("norms", ["layer0", "neighbour", "average"])
def test_norms_and_biases_come_from_where_the_setting_says(
    settings: Callable[..., Lesa], random_layers: RandomLayers, norms: str
) -> None:
    base = random_layers(4)
    _, made, _ = _expand(base, settings(position=[1, 3], norms=norms, epochs=1))
    for tensor in base[0]:
        if tensor.role.kind == "matrix":
            continue
        wanted = {
            "layer0": (base[0][tensor], base[0][tensor]),
            "neighbour": (base[1][tensor], base[3][tensor]),
            "average": ((base[1][tensor] + base[2][tensor]) / 2, base[3][tensor]),
        }[norms]
        assert torch.equal(made[2][tensor], wanted[0])
        assert torch.equal(made[5][tensor], wanted[1])


def test_zero_init_zeroes_the_outputs_of_both_blocks(
    settings: Callable[..., Lesa], random_layers: RandomLayers
) -> None:
    _, made, _ = _expand(random_layers(4), settings(zero_init=True))
    for tensors in made.values():
        for tensor, value in tensors.items():
            assert bool(value.any()) != (tensor.role.name in ("o", "down"))


def test_only_the_seed_matters(settings: Callable[..., Lesa], random_layers: RandomLayers) -> None:
    base = random_layers(4)
    torch.manual_seed(1)
    _, first, _ = _expand(base, settings(), seed=3)
    torch.manual_seed(2)
    _, again, _ = _expand(base, settings(), seed=3)
    _, other, _ = _expand(base, settings(), seed=4)
    matrix = next(tensor for tensor in base[0] if tensor.role.kind == "matrix")
    assert all(torch.equal(first[layer][t], again[layer][t]) for layer in first for t in first[layer])
    assert not torch.equal(first[2][matrix], other[2][matrix])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_concurrent_roles_does_not_matter(
    settings: Callable[..., Lesa], random_layers: RandomLayers, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    base = random_layers(4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    _, one, one_work = _expand(base, settings())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, several, several_work = _expand(base, settings())
    assert all(torch.equal(one[layer][t], several[layer][t]) for layer in one for t in one[layer])
    assert list(one_work.records.items()) == list(several_work.records.items())


def test_every_matrix_role_is_recorded(settings: Callable[..., Lesa], random_layers: RandomLayers) -> None:
    _, _, work = _expand(random_layers(4), settings())
    assert len(work.records) == 7
    assert all(facts["loss"] > 0 for facts in work.records.values())


def test_only_the_given_directions_are_trained_on(settings: Callable[..., Lesa]) -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(5, 6, 3, generator=generator)
    subset, alone = Predictor(3, 16, seed=1), Predictor(3, 16, seed=1)
    train_predictor(subset, right, settings(), seed=2, note=_ignore_progress, directions=torch.tensor([0, 2, 5]))
    train_predictor(alone, right[:, [0, 2, 5]], settings(), seed=2, note=_ignore_progress)
    for got, wanted in zip(subset.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_cosine_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [_learning_rate_factor("cosine", step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3)
    assert max(rates) == rates[4] == pytest.approx((1 + math.cos(0.04 * math.pi)) / 2)
    assert rates[99] == pytest.approx((1 + math.cos(0.99 * math.pi)) / 2)
    assert {_learning_rate_factor("constant", step, 100) for step in range(100)} == {1.0}


def test_an_interrupted_expansion_resumes_with_the_missing_roles(
    settings: Callable[..., Lesa], random_layers: RandomLayers
) -> None:
    base, chosen = random_layers(4), settings()
    plan, whole, _ = _expand(base, chosen)
    made = {(layer, tensor) for layer in whole for tensor in base[0] if tensor.role.name in ("q", "gate")}
    lacking = {key for key in made if key[0] == max(whole) and key[1].role.name == "gate"}  # so gate must be repeated
    rest = list(chosen.new_tensors(base, plan, Workspace(made=made - lacking, declared_seed=0)))
    assert {new.tensor.role.name for new in rest if new.tensor.role.kind == "matrix"} == {
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    }
    assert all(torch.equal(new.value, whole[new.layer][new.tensor]) for new in rest)


def test_a_large_role_is_trained_alone_with_the_same_result(
    settings: Callable[..., Lesa], random_layers: RandomLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_layers(4)
    _, small, _ = _expand(base, settings())
    monkeypatch.setattr(lesa_predictions, "GROUP_BYTES", 0)
    _, large, work = _expand(base, settings())
    assert all(torch.equal(small[layer][t], large[layer][t]) for layer in small for t in small[layer])
    assert len(work.records) == 7


def test_the_factors_of_a_group_are_freed_before_the_next_is_decomposed(
    settings: Callable[..., Lesa], random_layers: RandomLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesa_predictions, "GROUP_BYTES", 0)
    held: list[weakref.ref[lesa_predictions.MatrixRole]] = []
    prepare = lesa_predictions.prepare_role

    def watched(*arguments: Any) -> lesa_predictions.MatrixRole:
        assert all(reference() is None for reference in held)
        work = prepare(*arguments)
        held.append(weakref.ref(work))
        return work

    monkeypatch.setattr(lesa_predictions, "prepare_role", watched)
    _expand(random_layers(4), settings())
    assert len(held) == 7


def test_only_the_large_factor_may_be_on_another_device(settings: Callable[..., Lesa]) -> None:
    """Fake tensors of the meta device in the place of a GPU's: an operation on tensors of two devices raises."""
    with FakeTensorMode():
        right, samples = torch.empty(5, 6, 12), torch.arange(6, 24)
        with torch.device("meta"):
            predictor, left = Predictor(12, 16, seed=0), torch.empty(20, 6)
        predictor.initialize_on(right.flatten(0, 1), 6, samples, seed=1)
        loss = _batch_loss(predictor, right.flatten(0, 1), 6, samples, settings())
        loss.backward()
        assert loss.device.type == "meta"
        q = LayerTensor("self_attn.q_proj.weight", family_of("llama").roles["self_attn.q_proj.weight"])
        role = lesa_predictions.MatrixRole(q, 0, SharedSVD(left, right), predictor)
        for _, predicted in role.predict(insertion_plan((1, 1, 4), 5)):
            assert (left @ predicted).device.type == "meta"


def test_variants_are_presets_of_explicit_settings(expand_settings: ExpandSettings) -> None:
    default, fast = expand_settings("lesa"), expand_settings("lesa", variant="fast")
    assert isinstance(default, Lesa) and default.variant == "fast"
    assert isinstance(fast, Lesa) and (fast.epochs, fast.batch_size, fast.norm_batch) == (3, 256, 64)
    assert fast.standardized
    reference, paper = expand_settings("lesa", variant="reference"), expand_settings("lesa", variant="paper")
    assert isinstance(reference, Lesa) and isinstance(paper, Lesa)
    assert (reference.epochs, reference.norm_loss_weight, reference.standardized) == (10, 5e-4, False)
    assert (paper.epochs, paper.norm_loss_weight, paper.standardized) == (5, 5e-5, False)
    for authors in (reference, paper):
        assert (authors.batch_size, authors.norm_batch, authors.hidden_size) == (64, 64, 256)
        assert (authors.learning_rate, authors.weight_decay, authors.schedule) == (1e-3, 0.01, "constant")
        assert (authors.norms, authors.zero_init) == ("layer0", False)
