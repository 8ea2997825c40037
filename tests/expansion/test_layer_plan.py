"""Published placements, and the properties of arbitrary ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from pydantic import ValidationError

from pipeline.config import METHODS, AnyExpand
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan, gaps_of, insertion_plan, matched_layers
from pipeline.expansion.method import method_of
from pipeline.expansion.methods import built_in_method

ExpandSettings = Callable[..., AnyExpand]


def _new(plan: LayerPlan) -> list[int]:
    return [layer.layer for layer in plan.layers if layer.new]


def _sources(plan: LayerPlan) -> list[int]:
    return [layer.base[0] for layer in plan.layers]


def test_interleaving_8_into_32_is_llama_pro_on_llama_2() -> None:
    gaps = gaps_of("interleaved", 8, 32)
    assert gaps == (3, 7, 11, 15, 19, 23, 27, 31)
    plan = insertion_plan(gaps, 32)
    assert _new(plan) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert plan.layers[39].base == (31,)  # after the last layer there is no upper neighbor


@pytest.mark.parametrize("new_layers", [1, 3, 5, 7, 11, 29, 30, 31, 45])
def test_interleaved_is_as_even_as_integers_allow(new_layers: int) -> None:
    gaps = gaps_of("interleaved", new_layers, 30)
    assert len(gaps) == new_layers
    assert gaps[-1] == 29
    steps = [upper - lower for lower, upper in pairwise((-1, *gaps))]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("position", "gaps"),
    [("top", (7, 8)), ("bottom", (0, 1)), ("middle", (3, 4)), ("interleaved", (4, 9)), ([9, 2], (2, 9))],
)
def test_two_layers_in_a_base_of_ten(position: str | list[int], gaps: tuple[int, ...]) -> None:
    assert gaps_of(position, 2, 10) == gaps


@pytest.mark.parametrize(
    ("position", "gaps"), [("top", (0, 1, 2, 2)), ("bottom", (0, 0, 1, 2)), ("middle", (0, 1, 1, 2))]
)
def test_more_layers_than_gaps_fill_each_gap_first(position: str, gaps: tuple[int, ...]) -> None:
    assert gaps_of(position, 4, 4) == gaps


def test_several_layers_in_a_gap_are_made_by_halving() -> None:
    plan = insertion_plan((0, 0, 0), 2)
    assert [(layer.layer, layer.made_from) for layer in plan.new_layers] == [(2, (0, 4)), (1, (0, 2)), (3, (2, 4))]
    assert all(layer.base == (0, 1) for layer in plan.new_layers)
    assert [row.get("made_from") for row in plan.to_json()] == [None, [0, 2], None, [2, 4], None]


def test_the_second_of_two_in_a_gap_is_made_from_the_first() -> None:
    plan = insertion_plan((1, 1), 3)
    assert [(layer.layer, layer.made_from) for layer in plan.new_layers] == [(2, (1, 4)), (3, (2, 4))]


def test_layers_after_the_last_one_are_made_from_it() -> None:
    plan = insertion_plan((1, 1), 2)
    assert [(layer.layer, layer.base, layer.made_from) for layer in plan.new_layers] == [
        (2, (1,), (1, 1)),
        (3, (1,), (2, 1)),
    ]


@pytest.mark.parametrize("gaps", [(), (0,), (0, 0, 0, 2, 4), (4, 4, 4, 4), (0, 1, 1, 2, 2, 2, 3, 3, 3, 3)])
def test_every_insertion_keeps_the_base_in_order_and_is_made_in_order(gaps: tuple[int, ...]) -> None:
    plan = insertion_plan(gaps, 5)
    assert [layer.layer for layer in plan.layers] == list(range(5 + len(gaps)))
    assert [layer.base[0] for layer in plan.layers if not layer.new] == list(range(5))
    assert sorted(layer.base[0] for layer in plan.layers if layer.new) == list(gaps)
    assert list(plan.config_sources) == sorted(plan.config_sources)
    available = {layer.layer for layer in plan.layers if not layer.new}
    for layer in plan.new_layers:
        assert set(layer.made_from) <= available
        available.add(layer.layer)
    assert available == set(range(len(plan.layers)))


def test_solar_on_32_layers_is_24_and_24(expand_settings: ExpandSettings) -> None:
    plan = method_of(expand_settings("solar", new_layers=16)).place(32)
    assert _sources(plan) == [*range(24), *range(8, 32)]
    assert _new(plan) == list(range(24, 40))  # second occurrences of layers 8 to 23


@pytest.mark.parametrize(
    ("new_layers", "lower_copy", "upper_copy"),
    [(1, 3, 2), (2, 4, 2), (3, 4, 1), (4, 5, 1), (5, 5, 0)],
)
def test_solar_drops_half_of_the_surplus_from_each_copy(
    expand_settings: ExpandSettings, new_layers: int, lower_copy: int, upper_copy: int
) -> None:
    plan = method_of(expand_settings("solar", new_layers=new_layers)).place(5)
    assert _sources(plan) == [*range(lower_copy), *range(upper_copy, 5)]
    assert len(_new(plan)) == new_layers


def test_rows_of_expansion_json() -> None:
    assert insertion_plan((0,), 2).to_json() == [
        {"layer": 0, "new": False, "from": [0]},
        {"layer": 1, "new": True, "from": [0, 1]},
        {"layer": 2, "new": False, "from": [1]},
    ]


def test_none_adds_no_layer(expand_settings: ExpandSettings) -> None:
    settings = expand_settings("none", new_layers=8, position="top")
    assert (settings.new_layers, settings.position) == (0, None)
    assert _new(method_of(settings).place(4)) == []


@pytest.mark.parametrize(
    ("gaps", "layers"),
    [
        ((26, 27, 28), (26, 27, 28)),
        ((3, 7, 29), (3, 7, 29)),
        ((4, 4, 4, 4), (2, 3, 4, 5)),  # the lower one of two equally near
        ((0, 0, 0), (0, 1, 2)),
        ((4, 5, 5, 29, 29), (4, 5, 6, 28, 29)),
        (tuple(range(30)), tuple(range(30))),
    ],
)
def test_matched_layers_are_those_below_the_gaps(gaps: tuple[int, ...], layers: tuple[int, ...]) -> None:
    assert matched_layers(gaps, 30) == layers


def test_more_matched_layers_than_the_base_has_are_refused() -> None:
    with pytest.raises(UserError, match="30 or less"):
        matched_layers((0,) * 31, 30)


def test_none_names_the_layers_that_copies_would_be_made_of(expand_settings: ExpandSettings) -> None:
    for position in ("top", "middle", "bottom", "interleaved", [1, 4, 5, 8]):
        none = method_of(expand_settings("none", new_layers=4, position=position).with_matched_layers())
        copied = method_of(expand_settings("copy", new_layers=4, position=position)).place(9)
        assert none.matched_layers(9) == tuple(layer.base[0] for layer in copied.layers if layer.new)
        assert not none.place(9).new_layers


def test_solar_records_a_named_position_as_overlap(expand_settings: ExpandSettings) -> None:
    assert expand_settings("solar", position="top").position == "overlap"


@pytest.mark.parametrize("method", ["solar", "stack"])
@pytest.mark.parametrize("position", [[0, 1], "sideways"])
def test_methods_with_their_own_placement_refuse_other_positions(
    expand_settings: ExpandSettings, method: str, position: object
) -> None:
    with pytest.raises(ValidationError, match="position"):
        expand_settings(method, position=position)


@pytest.mark.parametrize(
    ("method", "changes", "layers", "message"),
    [
        ("solar", {"new_layers": 5}, 4, "expand.new_layers = 5.*at most 4.*expand.new_layers=4"),
        ("copy", {"new_layers": 3, "position": [0, 1]}, 4, "expand.new_layers = 3.*lists 2 gaps"),
        ("copy", {"new_layers": 2, "position": [0, 4]}, 4, r"expand.position = \[0, 4\].*gap 4 does not exist"),
        ("copy", {"new_layers": 1, "position": [-1]}, 4, "gap -1 does not exist"),
        ("copy", {"new_layers": 1, "position": "top"}, 1, "expand.position = top.*one layer"),
        ("lesa", {"new_layers": 1, "position": "top"}, 2, "expand.method = lesa.*at least 3 layers"),
    ],
)
def test_impossible_placements_are_refused_with_a_remedy(
    expand_settings: ExpandSettings, method: str, changes: dict[str, object], layers: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        method_of(expand_settings(method, **changes)).check(layers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("position", ["top", "middle", "bottom", "interleaved"])
@pytest.mark.parametrize("new_layers", [1, 4, 30])
def test_every_method_fits_every_named_position(
    expand_settings: ExpandSettings, method: str, position: str, new_layers: int
) -> None:
    settings = expand_settings(method, new_layers=new_layers, position=position)
    method_of(settings).check(30)
    assert len(method_of(settings).place(30).layers) == 30 + settings.new_layers


def test_methods_that_repeat_layers_and_none_train_everything_by_default() -> None:
    assert {method for method in METHODS if built_in_method(method).trains == "all"} == {"solar", "none", "stack"}


# ------------------------------------------------------------------------- published placements, any amount


@pytest.mark.parametrize(
    ("method", "position", "new_layers", "base", "new"),
    [
        ("llama_pro", "interleaved", 8, 32, list(range(4, 40, 5))),  # Llama-2-7B: one after every four
        ("opt_deus", "top", 16, 32, list(range(16, 48, 2))),  # Llama-3.1-8B: 16, 18, ..., 46 of 48
        ("opt_deus", "top", 8, 16, list(range(8, 24, 2))),  # Llama-3.2-1B: 8, 10, ..., 22 of 24
        ("lesa", "top", 16, 32, [gap + 1 + i for i, gap in enumerate(range(15, 31))]),  # gaps 15 ... 30
        ("lesa", list(range(15, 31)), 16, 32, [gap + 1 + i for i, gap in enumerate(range(15, 31))]),
        ("solar", "top", 16, 32, list(range(24, 40))),  # 24 + 24
    ],
)
def test_published_placements(
    expand_settings: ExpandSettings, method: str, position: object, new_layers: int, base: int, new: list[int]
) -> None:
    settings = expand_settings(method, new_layers=new_layers, position=position)
    method_of(settings).check(base)
    plan = method_of(settings).place(base)
    assert len(plan.layers) == base + new_layers
    assert _new(plan) == new


def _halved(lower: int, upper: int) -> dict[int, tuple[int, int]]:
    """Returns what each layer between two is made from, in passes over the remaining gaps until none is left.

    Of n layers in a gap, the middle one is the ceil(n/2)-th.
    """
    made, placed = {}, [lower, upper]
    while any(b - a > 1 for a, b in pairwise(placed)):
        for a, b in list(pairwise(placed)):
            if b - a > 1:
                middle = a + math.ceil((b - a - 1) / 2)
                made[middle] = (a, b)
                placed.append(middle)
        placed.sort()
    return made


@pytest.mark.parametrize("position", ["top", "middle", "bottom", "interleaved", "list"])
@pytest.mark.parametrize("base", [2, 3, 5, 12])
def test_any_number_of_layers_is_made_by_halving_every_gap(
    expand_settings: ExpandSettings, position: str, base: int
) -> None:
    for new_layers in range(1, 4 * base + 1):
        drawn = random.Random(new_layers).choices(range(base), k=new_layers)
        gaps = drawn if position == "list" else position
        plan = method_of(expand_settings("average", new_layers=new_layers, position=gaps)).place(base)
        assert len(_new(plan)) == new_layers
        old = [layer.layer for layer in plan.layers if not layer.new]
        wanted: dict[int, tuple[int, int]] = {}
        for lower, upper in pairwise([*old, len(plan.layers)]):
            between = _halved(lower, upper)
            if upper == len(plan.layers):  # after the last layer, which is also used as the upper neighbor
                between = {new: (a, lower if b == upper else b) for new, (a, b) in between.items()}
            wanted |= between
        assert {layer.layer: layer.made_from for layer in plan.new_layers} == wanted
        available = set(old)
        for layer in plan.new_layers:
            assert set(layer.made_from) <= available
            available.add(layer.layer)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("solar", "stack", "none")])
@pytest.mark.parametrize("position", ["top", "interleaved"])
def test_at_most_four_new_layers_per_base_layer(expand_settings: ExpandSettings, method: str, position: str) -> None:
    method_of(expand_settings(method, new_layers=48, position=position)).check(12)
    with pytest.raises(UserError, match=r"expand.new_layers = 49: .*at most 4 .*48.*expand.new_layers=48"):
        method_of(expand_settings(method, new_layers=49, position=position)).check(12)
