"""Imports point one way, heavy libraries stay in their rooms, and nothing pickles: read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "pipeline"

# A room may import rooms of its own layer and of those below, never of one above; within a layer there is no circle.
LAYERS = (
    {"__main__"},
    {"command", "planning"},
    {"submit", "status", "requeue"},
    {"run", "graph", "preflight", "messages"},
    {"stages"},
    {"expansion", "training", "evaluation", "data", "comparison", "model_dir", "model_check", "layer_config"}
    | {"layer_surgery", "shard_writer", "stored_names", "launch", "machine", "failure", "tracking", "progress"}
    | {"estimate"},
    {"architecture", "artifact", "attempts", "stage", "config", "errors", "flops", "shape", "watchdog", "disk"}
    | {"source", "hub", "gguf_metadata", "weight_files", "tensor_spec", "vector_math"}
    | {"slurm", "allocation", "lock", "node"},
)
LAYER = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
DRIVER = {room for rooms in LAYERS[:4] for room in rooms} | {
    "config", "artifact", "attempts", "launch", "machine", "failure", "errors", "stage", "source", "hub", "shape",
    "architecture", "watchdog", "disk", "slurm", "allocation", "lock", "flops", "estimate", "node",
}  # fmt: skip
HEAVY = {"torch", "transformers", "deepspeed", "lm_eval", "datasets", "accelerate"}
OWNERS = {
    "hydra": {"pipeline/__main__.py"},
    "omegaconf": {"pipeline/__main__.py"},
    "wandb": {"pipeline/tracking.py"},
    "lm_eval": {"pipeline/evaluation/"},
    "deepspeed": {"pipeline/training/"},
    "matplotlib": {"pipeline/comparison/"},
}
PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(file: Path) -> Iterator[str]:
    """Full dotted names of everything a file imports, at module level or inside a function."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imported(file) if name.startswith("pipeline.")}


def _libraries(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imported(file)}


def _name(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


rooms_of_the_house = pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py"], ids=_name)


def test_every_room_has_a_place_in_the_house() -> None:
    assert {_room(file) for file in FILES} - {"__init__"} <= set(LAYER)


@rooms_of_the_house
def test_imports_point_downwards(file: Path) -> None:
    upwards = {room for room in _imported_rooms(file) if LAYER[room] < LAYER[_room(file)]}
    assert not upwards


def test_rooms_do_not_import_each_other_in_circles() -> None:
    """A ``CycleError`` names the circle."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(_room(file), set()).update(_imported_rooms(file) - {_room(file)})
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", sorted((PACKAGE / "stages").glob("*.py")), ids=_name)
def test_stages_never_import_each_other(file: Path) -> None:
    assert "stages" not in _imported_rooms(file)


@pytest.mark.parametrize("file", [f for f in FILES if _room(f) in DRIVER], ids=_name)
def test_the_driver_never_imports_a_heavy_library(file: Path) -> None:
    assert not _libraries(file) & HEAVY


def test_starting_the_driver_loads_no_heavy_library() -> None:
    """The rooms that the driver looks into (methods' table, settings' checks) must be light as well."""
    unwanted = HEAVY | {"wandb", "numpy", "matplotlib"}
    program = f"import sys, pipeline.__main__; sys.exit(', '.join({unwanted} & set(sys.modules)) or 0)"
    answer = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    users = {_name(file) for file in FILES if library in _libraries(file)}
    assert {user for user in users if not user.startswith(tuple(OWNERS[library]))} == set()


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_nothing_pickles(file: Path) -> None:
    assert not _libraries(file) & PICKLING
    assert not {"torch.load", "torch.save"} & set(_imported(file))
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"line {node.value.lineno}"
            assert node.value.value is False, f"line {node.value.lineno}"
