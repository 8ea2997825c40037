"""A small study, and a directory for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.__main__ import compose_jobs, main
from pipeline.planning import prepare

CONTENDERS = {"copy": ["expand=copy"], "untouched": ["expand=none", "pretrain.trainable=all"]}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "common": ["+experiment=quickstart"],
    "contenders": CONTENDERS,
    "reference": "copy",
    "seeds": [0, 1],
    "tokens": 1024,  # 4 steps
    "equal_flops": True,
    "equal_seconds": False,
    "save_models": False,
    "flops_per_second": None,
    "tune": {"learning_rates": [0.001, 0.01], "seeds": [9], "rungs": [0.5], "keep": 0.5, "max_new_rates": 1},
}
SET_BY_THE_STUDY = ("pretrain.steps=", "pretrain.epochs=")


def study_arguments(shrunk: list[str], directory: Path) -> list[str]:
    """Returns the overrides of all runs, with a validation split and a text that is not trained on."""
    other = directory / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"Number {n} of another kind of text."}) for n in range(40)))
    source = (
        f"{{kind: files, path: {other}, config_name: null, split: null, revision: null, text_field: text, weight: 1.0}}"
    )
    kept = [item for item in shrunk if not item.startswith(SET_BY_THE_STUDY)]
    return [*kept, "data.validation_fraction=0.2", f"data.forgetting={source}"]


class Workplace:
    """A directory with a study's file and its results."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        self.directory, self._arguments = directory, [*arguments, f"output_dir={directory / 'outputs'}"]
        (directory / "study").mkdir(parents=True)

    def write(self, **changes: Any) -> None:
        """Writes the study's file with some changes."""
        (self.directory / "study" / "tiny.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))

    def run(self, *further: str) -> int:
        """Runs the command."""
        return main(["+study=tiny", f"--config-dir={self.directory}", *self._arguments, *further])

    @property
    def report(self) -> Path:
        """The report's directory."""
        return self.directory / "outputs" / "tiny" / "report"

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads((self.report / "results.json").read_text())

    def artifacts(self) -> dict[str, int]:
        """When every training artifact was finished."""
        found = (self.directory / "outputs" / "artifacts" / "pretrain").glob("*/manifest.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}

    def by_hand(self, row: dict[str, Any], *overrides: str) -> dict[str, Any]:
        """The summary of the training that a command line with the settings of a row would give."""
        settings = [
            f"pretrain.learning_rate={row['learning_rate']}",
            f"pretrain.steps={row['steps']}",
            "stages=[pretrain]",
        ]
        fractions = "[1.0]" if row["seed"] in STUDY["tune"]["seeds"] else "[0.0,1.0]"
        settings += ["pretrain.epochs=null", f"pretrain.evaluate_at={fractions}", "pretrain.save_model=false"]
        command = ["+experiment=quickstart", *self._arguments, *settings, f"seed={row['seed']}", *overrides]
        (prepared,) = prepare([compose_jobs(command, False, None)[0].settings])
        artifact = prepared.nodes["pretrain"].artifact
        assert artifact.is_complete()
        return json.loads((artifact.path / "training.json").read_text())
