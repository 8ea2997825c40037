"""Labels do not overlap, and colors identify methods."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from pipeline.config import METHODS
from pipeline.expansion.methods import built_in_method
from pipeline.report.plot_style import colors, spread
from pipeline.report.runs import RunArtifacts
from pipeline.report.study_plots import spaced_labels


def test_labels_keep_their_order_a_minimum_gap_and_the_limits() -> None:
    random = Random(1)
    for _ in range(200):
        positions = [random.uniform(0, 1) for _ in range(random.randint(1, 8))]
        placed = spread(positions, gap=0.1, low=0.0, high=1.0)
        order = sorted(range(len(positions)), key=lambda index: positions[index])
        distances = [placed[b] - placed[a] for a, b in pairwise(order)]
        assert all(distance >= 0.1 - 1e-12 for distance in distances)
        assert min(placed) >= -1e-12 and max(placed) <= 1 + 1e-12


def test_labels_that_do_not_touch_do_not_move() -> None:
    assert spread([0.9, 0.1, 0.5], gap=0.1, low=0.0, high=1.0) == [0.9, 0.1, 0.5]


def test_touching_labels_move_apart_around_their_center() -> None:
    low, high = spread([0.50, 0.52], gap=0.1, low=0.0, high=1.0)
    assert abs((low + high) / 2 - 0.51) < 1e-12 and abs(high - low - 0.1) < 1e-12


def test_learning_rates_that_would_overlap_have_no_label() -> None:
    rates = [5e-5, 1e-4, 2e-4, 2.5e-4, 4e-4, 5e-4, 1e-3, 4e-3]
    assert spaced_labels(rates) == ["5e-05", "0.0001", "0.0002", "", "0.0004", "", "0.001", "0.004"]
    assert spaced_labels([1e-3]) == ["0.001"]


def test_every_method_has_its_own_color_in_all_plots() -> None:
    runs = [RunArtifacts(method, method, {}) for method in METHODS]
    by_method = {method: built_in_method(method).color for method in METHODS}
    assert colors(runs) == by_method and len(set(by_method.values())) == len(METHODS)
    assert all(colors([run]) == {run.name: by_method[run.method]} for run in runs)


def test_repeated_and_unknown_methods_get_spare_colors() -> None:
    seeds = [RunArtifacts(f"seed-{i}", "lesa", {}) for i in range(10)]
    assert len(set(list(colors(seeds).values())[:8])) == 8
    mixed = [RunArtifacts("a", "lesa", {}), RunArtifacts("b", "brand_new", {})]
    assert colors(mixed)["a"] == built_in_method("lesa").color != colors(mixed)["b"]
