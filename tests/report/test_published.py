"""Published results appear for the papers' setups and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import METHODS
from pipeline.files import read_json
from pipeline.report.runs import RunArtifacts
from pipeline.report.sections import PUBLISHED_FILE, matching_setups, published_results
from tests.report.finished_runs import finished_run, write

LLAMA_32_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "vocab_size": 128256,
}  # fmt: skip


def _run(root: Path, config: dict, method: str, num_base: int, num_new: int) -> RunArtifacts:
    run = finished_run(root, method=method, num_base=num_base, num_new=num_new)
    write(run.directories["load"] / "config.json", config)
    return run


@pytest.mark.parametrize(
    ("config", "method", "num_base", "num_new", "bases"),
    [
        (LLAMA_32_1B, "opt_deus", 16, 8, ["Llama-3.2-1B"]),
        (LLAMA_32_1B, "none", 16, 8, ["Llama-3.2-1B"]),
        (LLAMA_32_1B, "opt_deus", 16, 4, []),
        (LLAMA_32_1B, "copy", 16, 8, []),
        ({**LLAMA_8B, "rope_scaling": {"rope_type": "llama3"}}, "lesa", 32, 16, ["Llama-3.1-8B"]),
        ({**LLAMA_8B, "rope_parameters": {"rope_type": "default"}}, "lesa", 32, 16, ["Llama-3-8B"]),
        ({**LLAMA_8B, "rope_scaling": None}, "lesa", 32, 16, ["Llama-3-8B"]),
        ({**LLAMA_8B, "hidden_size": 576}, "lesa", 32, 16, []),
    ],
)
def test_setups_match_by_architecture_depth_and_method(
    tmp_path: Path, config: dict, method: str, num_base: int, num_new: int, bases: list[str]
) -> None:
    assert [setup["base"] for setup in matching_setups([_run(tmp_path, config, method, num_base, num_new)])] == bases


def test_published_results_are_in_a_separate_table_with_their_source(tmp_path: Path) -> None:
    text = "\n".join(published_results([_run(tmp_path, LLAMA_32_1B, "opt_deus", 16, 8)]))
    assert "OpT-DeUS (arXiv 2508.08011): Llama-3.2-1B to 24 layers" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| OpT-DeUS") and "pre-trained" in line]
    assert "12.19" in line and "52.0 %" in line
    assert published_results([finished_run(tmp_path / "other")]) == []


def test_published_means_are_the_means_of_the_published_tasks() -> None:
    checked = 0
    for setup in read_json(PUBLISHED_FILE):
        for row in setup["rows"]:
            assert row["method"] in METHODS
            tasks = [value for name, value in row["values"].items() if name.endswith(" acc") and name != "mean acc"]
            if tasks:
                assert row["values"]["mean acc"] == pytest.approx(sum(tasks) / len(tasks), abs=1e-4)
                checked += 1
    assert checked == 24
