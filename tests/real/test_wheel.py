"""The package as users install it: a wheel, without the repository around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory into which the wheel was installed, apart from its dependencies."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", place / "dist", REPOSITORY], check=True)
    (wheel,) = (place / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    return place / "site"


def _run(installed: Path, program: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    place = installed.parent  # not the repository, whose packages Python would import first
    return subprocess.run(
        [sys.executable, *program], cwd=place, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_every_file_of_the_package_is_in_the_wheel(installed: Path) -> None:
    """Apart from Python modules, which setuptools finds: settings, styles, published numbers, tasks."""
    source = REPOSITORY / "pipeline"
    folders = [source, source / "conf"]  # the latter is a link, which rglob does not follow
    files = {path.relative_to(source) for folder in folders for path in folder.rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    assert len(files) > 250
    assert not {str(path) for path in files if not (installed / "pipeline" / path).is_file()}


def test_it_plans_the_quickstart(installed: Path) -> None:
    assert str(installed) in _run(installed, ["-c", "import pipeline; print(pipeline.__file__)"])
    planned = _run(installed, ["-m", "pipeline", "+experiment=quickstart", "action=plan"])
    assert "layers 30 -> 38" in planned and "no blockers found" in planned
