"""Collects the packages that scripts/benchmarks/gpu needs on a machine without a network, as wheels:

    python -m pip list --format=freeze > present.txt                                # there
    python -m scripts.benchmarks.wheels DIR --python 3.12 --present present.txt     # here, with a network
    python -m pip install --no-index --no-deps --target SITE DIR/*.whl              # there
    PYTHONPATH=SITE python -m scripts.benchmarks.gpu OUT

The versions are those installed here. Packages that are present there, in whatever version, are left out, and so are
those that only they need. Packages without wheels are built here, which works for those without
compiled code.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "depth-growth-pipeline"
UNUSED = {"lm-eval", "wandb"}  # requirements of the project that no benchmark imports
GLIBC = (17, 27, 28, 31, 34)  # minor versions of glibc 2 whose wheels the other machine can use


def missing(present: Collection[str], python: str) -> dict[str, str]:
    """Returns the version of every package that is needed and not present, by name.

    Args:
        present: canonical names.
        python: the other machine's Python version, such as 3.12.
    """
    found: dict[str, str] = {}
    remaining = [name for name in _requirements(PROJECT, python) if canonicalize_name(name) not in UNUSED]
    while remaining:
        name = canonicalize_name(remaining.pop())
        if name not in found and name not in present:
            found[name] = importlib.metadata.version(name)
            remaining += _requirements(name, python)
    return found


def _requirements(name: str, python: str) -> Iterator[str]:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement.name


def fetch(name: str, version: str, out: Path, python: str) -> None:
    """Downloads a package's wheel for the other machine, or builds one if the package has none.

    Raises:
        RuntimeError: neither succeeds, or the wheel that was built depends on this machine's Python.
    """
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    target += ["--platform=manylinux2014_x86_64", "--platform=any"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    package = f"{name}=={version}"
    download = subprocess.run(
        [*pip, "download", "--no-deps", *target, "--dest", str(out), package], capture_output=True, text=True
    )
    if download.returncode == 0:
        return
    build = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(out), package], capture_output=True, text=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )  # fmt: skip
    if build.returncode != 0:
        raise RuntimeError(f"{package} has no wheel and cannot be built:\n{download.stderr}\n{build.stderr}")
    built = [path for path in out.glob("*.whl") if canonicalize_name(path.name.split("-")[0]) == name]
    if any(not path.stem.endswith("none-any") for path in built):
        raise RuntimeError(f"{package} has compiled code, and its wheel would not work with another Python: {built}")


def names_in(freeze: str) -> set[str]:
    """Returns the canonical names of the packages in the output of ``pip list --format=freeze``, or a list of names."""
    lines = (line.strip() for line in freeze.splitlines())
    return {canonicalize_name(re.split(r"[=<>@ ]", line)[0]) for line in lines if line and not line.startswith("#")}


def main() -> None:
    """Fills the directory, and fails if the wheels are larger than the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--present", type=Path, help="what pip list --format=freeze prints there")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB of all wheels together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    present = names_in(options.present.read_text()) if options.present else set()
    for name, version in sorted(missing(present, options.python).items()):
        fetch(name, version, options.out, options.python)
        print(f"{name} {version}", flush=True)
    sizes = {path.name: path.stat().st_size / 2**20 for path in options.out.glob("*.whl")}
    print(f"{len(sizes)} wheels, {sum(sizes.values()):.1f} MiB")
    if sum(sizes.values()) > options.limit:
        largest = ", ".join(f"{name} {sizes[name]:.1f}" for name in sorted(sizes, key=lambda name: -sizes[name])[:5])
        sys.exit(
            f"error: more than --limit={options.limit:g} MiB; the largest are {largest}. Install them there, or "
            "list them in --present if they are not needed"
        )


if __name__ == "__main__":
    main()
