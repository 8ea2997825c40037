"""Stacked slices: published sequences of layers, exact copies, and refused sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import AnyExpand
from pipeline.errors import UserError
from pipeline.expansion.method import method_of
from pipeline.files import read_json
from pipeline.stages import expand
from tests.stages.one_task import make_task

ExpandSettings = Callable[..., AnyExpand]


@pytest.mark.parametrize(("new_layers", "slices"), [(1, ["0-2", "1-3"]), (2, ["0-2", "1-3"]), (4, ["0-3", "0-3"])])
def test_solar_is_a_stack_of_two_slices(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, new_layers: int, slices: list[str]
) -> None:
    """Weights and config are equal to the bit, and so are the origins of the layers."""
    if new_layers == 1:
        slices = ["0-2", "2-3"]  # the odd surplus is dropped from the upper copy
    for name, settings in {
        "solar": expand_settings("solar", new_layers=new_layers),
        "stack": expand_settings("stack", slices=slices),
    }.items():
        expand.run(make_task("expand", settings, tmp_path / name, {"load": tiny_llama_dir}))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "solar" / file).read_bytes() == (tmp_path / "stack" / file).read_bytes()
    solar, stack = (read_json(tmp_path / name / "expansion.json") for name in ("solar", "stack"))
    assert solar["layers"] == stack["layers"]
    assert stack["settings"]["new_layers"] == new_layers


@pytest.mark.parametrize(
    ("slices", "base", "sources", "new"),
    [
        (["0-21", "14-29"], 30, [*range(22), *range(14, 30)], range(22, 30)),
        (["0-23", "8-31"], 32, [*range(24), *range(8, 32)], range(24, 40)),  # SOLAR 10.7B
        (["0-3", "0-3", "0-3"], 4, [*range(4)] * 3, range(4, 12)),  # G_stack, growth factor 3
        (["0-2", "1-2", "1-3"], 4, [0, 1, 2, 1, 2, 1, 2, 3], range(3, 7)),  # a block of two, three times
        (["0", "0", "1", 1, 2], 3, [0, 0, 1, 1, 2], (1, 3)),  # single layers, each in place
    ],
)
def test_slices_follow_each_other(
    expand_settings: ExpandSettings, slices: list[object], base: int, sources: list[int], new: range | tuple[int, ...]
) -> None:
    settings = expand_settings("stack", slices=slices, new_layers=1)
    plan = method_of(settings).place(base)
    assert list(plan.config_sources) == sources
    assert [layer.layer for layer in plan.layers if layer.new] == list(new)
    assert settings.new_layers == len(sources) - base


@pytest.mark.parametrize(("new_layers", "expected"), [(2, [0, 1, 2, 1, 2, 3]), (3, [0, 1, 2, 0, 1, 2, 3])])
def test_without_slices_the_middle_occurs_twice(
    expand_settings: ExpandSettings, new_layers: int, expected: list[int]
) -> None:
    method = method_of(expand_settings("stack", new_layers=new_layers))
    assert list(method.place(4).config_sources) == expected
    with pytest.raises(UserError, match="expand.new_layers = .*expand.slices"):
        method.place(new_layers - 1)


@pytest.mark.parametrize("text", ["29-14", "0..5", "-3", "a-b", ""])
def test_what_is_not_a_slice_is_refused(expand_settings: ExpandSettings, text: str) -> None:
    with pytest.raises(ValidationError, match="is not a slice"):
        expand_settings("stack", slices=["0-5", text])


def test_slices_that_repeat_nothing_are_refused(expand_settings: ExpandSettings) -> None:
    with pytest.raises(ValidationError, match="no layer occurs twice"):
        expand_settings("stack", slices=["0-5", "6-9"])


@pytest.mark.parametrize(
    ("slices", "fault"),
    [
        (["0-4", "2-7"], "there is no layer 6"),
        (["0-1", "1-1", "3-5"], "layer 2 does not occur"),
        (["0-4", "2-4"], "layer 5 does not occur"),
        (["0-1", "3-5", "2-5"], "layer 3 occurs before"),
    ],
)
def test_every_layer_of_the_base_must_occur_in_order(
    expand_settings: ExpandSettings, slices: list[str], fault: str
) -> None:
    with pytest.raises(UserError, match=f"expand.slices = .*{fault}"):
        method_of(expand_settings("stack", slices=slices)).check(6)
