"""Decoding with a cache is compared with decoding without, where rounding may change the choice of experts."""

from __future__ import annotations

import pytest
import torch

from pipeline.models import cache_check
from pipeline.models.family_inference.infer import tokens_for
from tests.family_coverage import tiny_model


def test_a_deep_mixture_of_experts_passes() -> None:
    """In float32, one of the routers of its 48 layers chooses another expert with the cache, at least on some CPUs."""
    model = tiny_model("llama4")
    assert model.config.num_hidden_layers == 48
    assert cache_check.cache_difference(model, tokens_for(model)) <= cache_check.CACHE_TOLERANCE


def test_what_rounding_does_not_explain_is_reported_and_the_model_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(cache_check, "CACHE_TOLERANCE", -1.0)  # every difference is computed again
    assert cache_check.cache_difference(model, tokens_for(model)) < 1e-4
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **cache: forward(ids if ids.shape[1] > 1 else (ids + 1) % 80, **cache)
    )
    assert cache_check.cache_difference(model, tokens_for(model)) > 0.01
    after = model.state_dict()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
