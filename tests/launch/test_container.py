"""The recipe of the container image: its files exist, its scripts parse, and it installs what setup installs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = (REPOSITORY / "scripts" / "apptainer.def").read_text()
SECTIONS = dict(re.findall(r"^%(\w+)\n((?: {4}.*\n|\n)*)", RECIPE, re.MULTILINE))


def test_all_files_of_an_installation_are_copied() -> None:
    copied = {line.split()[0] for line in SECTIONS["files"].splitlines() if line.strip()}
    assert all((REPOSITORY / name).exists() for name in copied)
    # pipeline/conf is a link to conf, and pyproject.toml names the README.
    assert {"pipeline", "conf", "pyproject.toml", "README.md", "LICENSE"} <= copied
    assert {"constraints.txt", "requirements.lock"} <= copied


def test_the_scripts_parse() -> None:
    for name in ("post", "test", "runscript"):
        subprocess.run(["bash", "-n"], input=SECTIONS[name], text=True, check=True)


def test_it_installs_what_setup_installs() -> None:
    setup = (REPOSITORY / "scripts" / "setup").read_text()
    assert "grep '^torch==' constraints.txt" in SECTIONS["post"] and "grep '^torch==' constraints.txt" in setup
    for argument in ("--no-deps", "--require-hashes -r requirements.lock", "DS_BUILD_OPS=0"):
        assert argument in SECTIONS["post"] and argument in setup
