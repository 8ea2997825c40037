"""Imports point downwards by package, heavy libraries have one owner, and nothing pickles; checked from the source."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "pipeline"

# From top to bottom: a package may import from those after it, never from those before it.
PACKAGES = [
    "__main__", "study", "command", "export", "planning", "driver", "stages", "estimates", "report", "evaluation",
    "training", "expansion", "chat", "data", "models", "tracking", "trackers", "progress", "artifacts", "launch",
    "config", "files", "standard_errors", "errors",
]  # fmt: skip
DRIVER = {
    "__main__", "study", "command", "export", "planning", "driver", "estimates", "artifacts", "launch", "config",
    "files", "errors",
}  # fmt: skip
HEAVY = {"torch", "transformers", "deepspeed", "lm_eval", "datasets", "accelerate"}
OWNERS = {
    "hydra": "pipeline/__main__.py",
    "omegaconf": "pipeline/__main__.py",
    "wandb": "pipeline/trackers.py",
    "tensorboard": "pipeline/trackers.py",
    "mlflow": "pipeline/trackers.py",
    "lm_eval": "pipeline/evaluation/",
    "deepspeed": "pipeline/training/",
    "matplotlib": "pipeline/report/",
}
PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


@cache
def _imported(file: Path) -> frozenset[str]:
    """Full dotted names of everything a file imports, at module level or inside a function."""
    return frozenset(_names(file))


def _names(file: Path) -> Iterator[str]:
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _package(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _packages(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imported(file) if name.startswith("pipeline.")}


def _libraries(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imported(file)}


def _name(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def test_there_are_at_most_eight_modules_beside_the_packages() -> None:
    assert {_package(file) for file in FILES} == {*PACKAGES, "__init__"}
    assert len([file for file in PACKAGE.glob("*.py") if file.stem != "__init__"]) <= 8


def test_imports_point_downwards_by_package() -> None:
    rank = {package: number for number, package in enumerate(PACKAGES)}
    upwards = [
        f"{_name(file)} imports {package}"
        for file in FILES
        if _package(file) in rank
        for package in _packages(file)
        if rank[package] < rank[_package(file)]
    ]
    assert not upwards


def test_stages_never_import_each_other() -> None:
    assert not [_name(file) for file in FILES if _package(file) == "stages" and "stages" in _packages(file)]


def test_the_driver_imports_no_heavy_library() -> None:
    assert not [_name(file) for file in FILES if _package(file) in DRIVER and _libraries(file) & HEAVY]
    unwanted = HEAVY | {"wandb", "numpy", "matplotlib"}  # what the driver imports from other packages is light as well
    program = f"""
import sys, pipeline.__main__
from pipeline.config import METHODS
from pipeline.expansion.methods import built_in_method
[built_in_method(name) for name in METHODS]
sys.exit(', '.join({unwanted} & set(sys.modules)) or 0)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_each_heavy_library_has_one_owner() -> None:
    for library, owner in OWNERS.items():
        users = {_name(file) for file in FILES if library in _libraries(file)}
        assert users, f"no module imports {library}"
        assert not {user for user in users if not user.startswith(owner)}, library


# Required, though no module imports them: transformers does.
USED_BY_OTHERS = {"accelerate"}
# In the standard library since Python 3.14. Before, backports.zstd provides it.
NEWER_STANDARD_LIBRARY = {"compression"}
INSTALLED_BY_A_TEST = {"peft", "trl"}  # tests/real/test_other_programs.py


def test_imported_packages_are_declared_and_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required, extras = project["dependencies"], project["optional-dependencies"]
    own = [line for name, extra in extras.items() if name != "dev" for line in extra]
    product, optional = _distributions(required), _distributions(own)
    assert _undeclared(FILES, product | optional) == set()
    others = [file for folder in ("scripts", "tests") for file in (REPOSITORY / folder).rglob("*.py")]
    development = product | optional | _distributions(extras["dev"])
    assert _undeclared(others, development) == INSTALLED_BY_A_TEST

    imported = {name for file in FILES for library in _libraries(file) for name in _providers(library)}
    assert product | optional <= imported | USED_BY_OTHERS
    pinned = _distributions((REPOSITORY / "constraints.txt").read_text().splitlines())
    assert development <= pinned | {_normalized(project["name"])}


def test_the_lock_file_has_the_pinned_versions_with_hashes() -> None:
    pinned = set(re.findall(r"^(?!torch==)[\w.-]+==\S+", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    entries = re.split(r"^(?=\w)", (REPOSITORY / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    locked = {entry.split()[0]: re.findall(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries}
    assert _versions(locked) == _versions(pinned), "run scripts/lock"
    assert all(locked.values())
    assert "--require-hashes -r requirements.lock" in (REPOSITORY / "scripts" / "setup").read_text()


def _undeclared(files: Iterable[Path], declared: set[str]) -> set[str]:
    own = {"pipeline", "scripts", "tests"} | NEWER_STANDARD_LIBRARY | sys.stdlib_module_names
    found = {library for file in files for library in _libraries(file)} - own
    return {library for library in found if not _providers(library) & declared}


def _versions(pins: Iterable[str]) -> set[tuple[str, str]]:
    return {(_normalized(name), version) for name, version in (pin.split("==") for pin in pins)}


def _distributions(requirements: Iterable[str]) -> set[str]:
    """Returns the names of the distributions in lines such as ``numpy>=2  # a comment``."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {_normalized(name.group()) for name in names if name}


@cache
def _providers(library: str) -> set[str]:
    """Returns the installed distributions that contain a top-level package, such as ``pot`` for ``ot``."""
    return {_normalized(name) for name in _installed().get(library, ())}


_installed = cache(importlib.metadata.packages_distributions)


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_code_of_a_model_is_run() -> None:
    """transformers otherwise asks a user in a terminal whether to run it."""
    calls = [(file, node) for file in FILES for node in ast.walk(_tree(file)) if isinstance(node, ast.Call)]
    loading = [(file, call) for file, call in calls if ast.unparse(call.func).startswith("Auto")]
    loading = [(file, call) for file, call in loading if ast.unparse(call.func).endswith(".from_pretrained")]
    assert loading
    for file, call in loading:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{_name(file)}:{call.lineno}"


def test_nothing_pickles() -> None:
    for file in FILES:
        assert not _libraries(file) & PICKLING, file
        assert not {"torch.load", "torch.save"} & _imported(file), file
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{file}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), f"{file}:{node.value.lineno}"
                assert node.value.value is False, f"{file}:{node.value.lineno}"


def test_a_public_name_is_defined_once() -> None:
    """Except ``run``, the entry point of every stage, and ``main``, that of every program."""
    definitions: dict[str, set[str]] = {}
    for file in FILES:
        for name in _top_level_names(file):
            if not name.startswith("_") and name not in ("run", "main"):
                definitions.setdefault(name, set()).add(_name(file))
    assert not {name: files for name, files in definitions.items() if len(files) > 1}


def _top_level_names(file: Path) -> Iterator[str]:
    """Yields the names of the functions, classes and constants that a file defines at module level."""
    for node in _tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # A statement may assign several names at once: ``LOGS, CHECKPOINTS = ...``.
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
