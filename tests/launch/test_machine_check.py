"""``scripts/setup`` repairs an environment. ``--check`` tells what a machine has, and what training would lack."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.driver.run import package_versions
from pipeline.launch.machine import detect_machine
from scripts.machine import Finding, findings, main

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without programs, GPUs or a network, whose hardware is detected anew."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("CUDA_VISIBLE_DEVICES", "CXX", "CC", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for function in (detect_machine, package_versions):
        function.cache_clear()
    yield
    for function in (detect_machine, package_versions):
        function.cache_clear()


def _found(what: str) -> Finding:
    return next(finding for finding in findings() if finding.what == what)


def test_an_environment_without_pip_is_completed(tmp_path: Path) -> None:
    """As an interrupted setup leaves it, or one without Debian's python3-venv. Scripts take the place of Pythons."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts", ignore=lambda *_: {"benchmarks"})
    for name in ("pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    own, python = tmp_path / ".venv" / "bin" / "python", tmp_path / "python3"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\nexit 1\n")
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] && printf "#!/bin/sh\\n" > {own}\nexit 0\n')
    for script in (own, python):
        script.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    for _ in range(2):
        subprocess.run([tmp_path / "scripts" / "setup"], env=environment, check=True)
        assert (tmp_path / ".venv" / "installed").exists()


def test_a_machine_with_all_packages_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    printed = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in printed
    assert "offline (HF_HUB_OFFLINE)" in printed


def test_what_compilation_lacks_is_named_with_a_remedy() -> None:
    compilation = _found("torch.compile")
    assert "g++ was not found" in compilation.found and compilation.remedy is not None
    assert _found("Slurm").found.startswith("none")


def test_gpus_that_torch_cannot_use(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H100" || echo "NVIDIA H100, 81559 MiB, 570.1"\n'
    )
    program.chmod(0o755)
    gpus = _found("GPUs")
    assert gpus.found == "NVIDIA H100, 81559 MiB, 570.1"
    if detect_machine().gpus:
        assert gpus.remedy is None
    else:
        assert gpus.remedy is not None and gpus.remedy.startswith("torch is a build for CPUs")


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = importlib.metadata.version

    def without_deepspeed(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_deepspeed)
    assert main() == 1
    assert "deepspeed: it is required, but not installed" in capsys.readouterr().out
