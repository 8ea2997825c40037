"""OpT-DeUS against a plain Sinkhorn in the log domain and the paper's description of the transport flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.config import AnyExpand
from pipeline.expansion.method import Workspace
from pipeline.expansion.methods.opt_deus import OptDeus, fuse
from pipeline.expansion.sinkhorn import sinkhorn_log, sinkhorn_pot
from pipeline.models.families import LayerTensor
from tests.expansion.random_layer import Layers
from tests.naive import distances, fused_layer, relative_difference, sinkhorn, sinkhorn_in_logs

ExpandSettings = Callable[..., AnyExpand]
RandomLayers = Callable[[int], Layers]


@pytest.fixture
def costs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    return distances(first, second)


def test_the_log_domain_solver_finds_the_optimal_plan(costs: Tensor) -> None:
    """Equal to that of as many plain iterations, and to that of converged ones."""
    solved = sinkhorn_log(costs, 0.06, max_iterations=5000, marginal_error=1e-6)
    assert solved.iterations is not None and solved.iterations < 5000
    assert relative_difference(solved.plan, sinkhorn_in_logs(costs, 0.06, solved.iterations)) < 1e-5
    assert relative_difference(solved.plan, sinkhorn(costs, 0.06)) < 1e-5
    torch.testing.assert_close(solved.plan.sum(dim=0), torch.full((7,), 1 / 7))
    assert solved.marginal_error < 1e-5
    assert solved.outcome(1e-5) == "converged"


def test_problems_whose_kernel_underflows_are_solved(costs: Tensor) -> None:
    assert (torch.exp(-costs * 100 / 0.06) == 0).any()
    solved = sinkhorn_log(costs * 100, 0.06, max_iterations=20000, marginal_error=1e-3)
    assert solved.outcome(2e-3) == "converged"
    assert torch.isfinite(solved.plan).all()


def test_a_solve_that_did_not_converge_is_reported(costs: Tensor) -> None:
    solved = sinkhorn_log(costs, 0.06, max_iterations=1, marginal_error=1e-6)
    assert (solved.iterations, solved.outcome(1e-6)) == (1, "not converged")


def test_the_authors_solver_agrees_where_it_does_not_underflow(costs: Tensor) -> None:
    solved = sinkhorn_pot(costs, 0.5, max_iterations=10000, marginal_error=1e-9)
    assert relative_difference(solved.plan, sinkhorn(costs, 0.5)) < 1e-5
    assert solved.outcome(1e-9) == "converged"  # as far as float32 can tell


def test_the_authors_solver_returns_a_zero_plan_where_it_underflows(costs: Tensor) -> None:
    solved = sinkhorn_pot(costs + 20, 0.06, max_iterations=10000, marginal_error=1e-9)
    assert float(solved.plan.sum()) < 1e-6
    assert solved.outcome(1e-9) == "underflow: the plan is zero"


def _named(layer: dict[LayerTensor, Tensor]) -> dict[str, Tensor]:
    return {tensor.name: value for tensor, value in layer.items()}


def _settings(expand_settings: ExpandSettings, **changes: object) -> OptDeus:
    settings = expand_settings("opt_deus", new_layers=1, position=[1], **changes)
    assert isinstance(settings, OptDeus)
    return settings


def _iterations(work: Workspace) -> dict[str, int]:
    """Returns the Sinkhorn iterations of one new layer by module."""
    return {name.split()[-1]: facts["iterations"] for name, facts in work.records.items()}


@pytest.mark.parametrize("rescale", [True, False])
def test_a_layer_is_fused_as_the_paper_describes(
    expand_settings: ExpandSettings, random_layers: RandomLayers, rescale: bool
) -> None:
    settings = _settings(expand_settings, rescale_plan=rescale)
    base, plan, work = random_layers(4), settings.place(4), Workspace()
    made = {tensor.name: value for _, tensor, value in settings.new_tensors(base, plan, work)}
    wanted = fused_layer(_named(base[1]), _named(base[2]), _iterations(work), rescale)
    assert set(made) == set(wanted)
    for name, value in made.items():
        if "o_proj" in name or "down_proj" in name:
            assert not value.any(), name
        else:
            assert relative_difference(value, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("rescale", [True, False])
def test_outputs_are_fused_before_they_are_zeroed(random_layers: RandomLayers, rescale: bool) -> None:
    """Further layers of the same gap are made from them."""
    lower, upper = random_layers(2)
    iterations: dict[str, int] = {}

    def solve(tensor: LayerTensor, w1: Tensor, w2: Tensor) -> Tensor:
        solved = sinkhorn_log(distances(w1, w2), 0.06, max_iterations=1000, marginal_error=1e-3)
        assert solved.iterations is not None
        iterations[tensor.module] = solved.iterations
        return solved.plan * len(w1) if rescale else solved.plan

    fused = _named(dict(fuse(lower, upper, solve)))
    wanted = fused_layer(_named(lower), _named(upper), iterations, rescale)
    assert set(fused) == set(wanted)
    for name, value in fused.items():
        assert relative_difference(value, wanted[name]) < 1e-5, name


def test_permuted_neurons_are_aligned(random_layers: RandomLayers) -> None:
    """If the lower matrix is a permutation of the upper one, the fused matrix is the upper one."""
    (upper,) = random_layers(1)
    tensor = next(tensor for tensor in upper if tensor.role.name == "q" and tensor.role.kind == "matrix")
    w2 = upper[tensor]
    w1 = w2[torch.randperm(len(w2), generator=torch.Generator().manual_seed(0))]
    plan = sinkhorn_log(torch.cdist(w1, w2), 0.06, 1000, 1e-4).plan * len(w1)
    torch.testing.assert_close((plan.T @ w1 + w2) / 2, w2, atol=1e-3, rtol=1e-3)


def test_the_reference_preset_reproduces_the_zero_plan(
    expand_settings: ExpandSettings, random_layers: RandomLayers
) -> None:
    """If the authors' float32 solver underflows, the new matrices are half of the upper layer's."""
    settings = _settings(expand_settings, variant="reference")
    assert (settings.solver, settings.rescale_plan, settings.marginal_error) == ("pot_float32", False, 1e-9)
    base = [{tensor: value * 30 for tensor, value in layer.items()} for layer in random_layers(4)]
    work = Workspace()
    made = {tensor.name: value for _, tensor, value in settings.new_tensors(base, settings.place(4), work)}
    upper = _named(base[2])
    torch.testing.assert_close(made["self_attn.q_proj.weight"], upper["self_attn.q_proj.weight"] / 2)
    torch.testing.assert_close(made["mlp.gate_proj.weight"], upper["mlp.gate_proj.weight"] / 2)
    assert work.warnings == ["7 of 7 transport problems: underflow: the plan is zero"]


def test_the_outcome_of_every_solve_is_recorded(expand_settings: ExpandSettings, random_layers: RandomLayers) -> None:
    settings = _settings(expand_settings)
    work = Workspace()
    list(settings.new_tensors(random_layers(3), settings.place(3), work))
    assert len(work.records) == 7
    facts = work.records["layer 2 self_attn.q_proj"]
    assert facts["outcome"] == "converged"
    assert 0 <= facts["marginal_error"] <= 1e-3
    assert work.warnings == []


def test_several_layers_in_a_gap_are_fused_from_one_another(
    expand_settings: ExpandSettings, random_layers: RandomLayers
) -> None:
    settings = expand_settings("opt_deus", new_layers=2, position=[0, 0])
    made: dict[int, dict[str, Tensor]] = {1: {}, 2: {}}
    base = random_layers(2)
    for layer, tensor, value in settings.new_tensors(base, settings.place(2), Workspace()):
        made[layer][tensor.name] = value
    name = "input_layernorm.weight"
    lower, upper = (_named(layer)[name] for layer in base)
    torch.testing.assert_close(made[1][name], (lower + upper) / 2)
    torch.testing.assert_close(made[2][name], ((lower + upper) / 2 + upper) / 2)
