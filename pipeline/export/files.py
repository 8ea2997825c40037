"""The files of a model to publish: config, weights, tokenizer, chat template, its own code, where layers are from.

Manifests, logs and metrics are left out, and so are local paths in transformers' configs.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.files import read_json, write_json
from pipeline.models.source import model_files

ADDED = ("expansion.json", "README.md")
PATH_ENTRIES = ("_name_or_path", "name_or_path")  # where transformers loaded a model or tokenizer from


def stage_files(model: Path, folder: Path, with_code: bool = True) -> None:
    """Fills a folder with links to the files of a model, and with copies of those that name a path.

    Args:
        model: the model directory.
        folder: is created if it does not exist.
        with_code: whether the model's own code is among the files, if it has some.
    """
    folder.mkdir(exist_ok=True)
    files = [file for file in model_files(model) if with_code or file.suffix != ".py"]
    for file in [*files, *(model / name for name in ADDED if (model / name).is_file())]:
        place = folder / file.name
        content = read_json(file) if file.name.endswith("config.json") else {}
        if set(PATH_ENTRIES) & set(content):
            write_json(place, {name: value for name, value in content.items() if name not in PATH_ENTRIES})
        else:
            place.symlink_to(file.resolve())
