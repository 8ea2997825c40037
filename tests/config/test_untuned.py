"""``data.instructions=null``: what files ask of tuning is left out, and what the command line asks is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.config import STAGE_NAMES, Settings
from pipeline.config.untuned import tuning_requests
from pipeline.errors import UserError

WITHOUT = ("+experiment=quickstart", "data.instructions=null")


def _compose(*overrides: str, config_dir: Path | None = None) -> Settings:
    return compose_jobs(list(overrides), False, config_dir)[0].settings


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A configuration directory with an experiment that has no conversations, but asks for a tuned model."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "defaults:\n  - override /data: files\nname: mine\ntarget: sft\ndata:\n  corpus: {path: /texts}\n"
        "  instructions: null\nevaluate: {targets: [load, pretrain@20%, pretrain, sft@50%, sft], sample_answers: 2}\n"
        "sft: {corpus_fraction: 0.3}\n"
    )
    return tmp_path


def test_what_the_quickstart_asks_of_tuning_is_left_out() -> None:
    run = _compose(*WITHOUT)
    assert run.stages == [stage for stage in STAGE_NAMES if stage != "sft"]
    assert run.evaluate.targets == ["load", "expand", "pretrain"]
    assert (run.evaluate.sample_answers, run.sft.corpus_fraction) == (0, 0.0)
    assert list(tuning_requests(run)) == []


def test_what_an_experiment_of_ones_own_asks_of_tuning_is_left_out(mine: Path) -> None:
    run = _compose("+experiment=mine", config_dir=mine)
    assert run.evaluate.targets == ["load", "pretrain@20%", "pretrain"]
    assert (run.target, run.evaluate.sample_answers, run.sft.corpus_fraction) == (None, 0, 0.0)


def test_an_experiment_that_only_tunes_is_not_reduced_to_nothing(mine: Path) -> None:
    with (mine / "experiment" / "mine.yaml").open("a") as file:
        file.write("stages: [sft]\ncompare: [sft]\n")
    run = _compose("+experiment=mine", config_dir=mine)
    assert list(tuning_requests(run)) == [("compare", "sft"), ("stages", "sft")]


def test_without_conversations_all_other_settings_are_the_same() -> None:
    tuned, untuned = _compose("+experiment=quickstart").model_dump(), _compose(*WITHOUT).model_dump()
    for run in (tuned, untuned):
        run["data"].pop("instructions")
        run.pop("stages")
        run["evaluate"] = {k: v for k, v in run["evaluate"].items() if k not in ("targets", "sample_answers")}
        run["sft"].pop("corpus_fraction")
    assert tuned == untuned


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("evaluate.targets=[load,sft@50%,sft]", "evaluate.targets", "sft@50%, sft"),
        ("stages=[pretrain,sft]", "stages", "sft"),
        ("force=[sft]", "force", "sft"),
        ("evaluate.sample_answers=3", "evaluate.sample_answers", 3),
        ("++evaluate={sample_answers: 3}", "evaluate.sample_answers", 3),
        ("sft.corpus_fraction=0.1", "sft.corpus_fraction", 0.1),
        ("sft={corpus_fraction: 0.1}", "sft.corpus_fraction", 0.1),
        ("target=sft", "target", "sft"),
        ("compare=load,sft", "compare", "sft"),
    ],
)
def test_what_the_command_line_asks_of_tuning_is_kept(override: str, setting: str, value: object) -> None:
    assert list(tuning_requests(_compose(*WITHOUT, override))) == [(setting, value)]
    assert list(tuning_requests(_compose("+experiment=quickstart", override))) == []


@pytest.mark.parametrize("override", ["sft.learning_rate=1e-5", "evaluate.sample_answers=0", "stages=[pretrain]"])
def test_the_command_line_may_say_what_contradicts_nothing(override: str) -> None:
    assert list(tuning_requests(_compose(*WITHOUT, override))) == []


def test_the_message_about_missing_conversations_says_how_to_do_without() -> None:
    with pytest.raises(UserError) as caught:
        _compose("+experiment=quickstart", "data=files", "data.corpus.path=/texts")
    assert caught.value.setting == "data.instructions.path" and "data.instructions=null" in caught.value.remedy


def test_conversations_can_be_given_where_an_experiment_has_none(mine: Path) -> None:
    with pytest.raises(UserError) as caught:
        _compose("+experiment=mine", "data.instructions.path=/chats", config_dir=mine)
    assert caught.value.setting == "data.instructions.path" and "data.instructions is null" in caught.value.rule
    source = "{kind: files, path: /chats, config_name: null, split: null, revision: null, text_field: null, weight: 1}"
    run = _compose("+experiment=mine", f"data.instructions={source}", "target=null", config_dir=mine)
    assert run.tunes and run.evaluate.targets[-1] == "sft" and run.training_stages[-1] == "sft"
