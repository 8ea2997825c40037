"""A study on the tiny model, from its YAML to its report, in this process."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.__main__ import CONF, compose_jobs, main
from pipeline.config.messages import list_choices
from pipeline.errors import EXIT_DONE, EXIT_REQUEST
from pipeline.study.loading import load_study
from tests.study.one_worker import TrainingWorker
from tests.study.small_study import CONTENDERS, STUDY, Workplace

SHARING = pytest.mark.xdist_group("study")  # one pytest worker runs these tests, so that there is one study


def test_a_study_is_not_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+study=quick", "--multirun", "expand.position=top,middle"]) == EXIT_REQUEST
    assert "--multirun = +study=quick" in capsys.readouterr().err


@SHARING
def test_losses_are_those_of_runs_made_by_hand(finished: Workplace) -> None:
    rows = finished.results()["rows"]
    assert {(row["contender"], row["budget"], row["seed"]) for row in rows} == {
        (name, budget, seed) for name in CONTENDERS for budget in ("tokens", "flops") for seed in (0, 1)
    }
    for row in rows:
        training = finished.by_hand(row, *CONTENDERS[row["contender"]])
        last = training["held_out"][-1]
        assert row["held_out_loss"] == last["loss"] and row["forgetting_loss"] == last["forgetting_loss"]
        assert (row["tokens"], row["flops"]) == (training["tokens"], training["flops"])
    tokens = {row["tokens"] for row in rows if row["budget"] == "tokens"}
    assert tokens == {STUDY["tokens"]}
    flops = {row["contender"]: row["flops"] for row in rows if row["budget"] == "flops" and row["seed"] == 0}
    steps = next(row["steps"] for row in rows if row["budget"] == "flops" and row["contender"] == "untouched")
    assert abs(flops["untouched"] - flops["copy"]) <= flops["untouched"] / steps / 2 * 1.01  # the nearest whole step


@SHARING
def test_the_rate_with_the_lowest_validation_loss_is_chosen_between_its_neighbors(finished: Workplace) -> None:
    tuning = finished.results()["tuning"]
    for name in CONTENDERS:
        losses = {row["learning_rate"]: row["validation_loss"] for row in tuning if row["contender"] == name}
        (chosen,) = [row for row in tuning if row["contender"] == name and row["chosen"]]
        assert chosen["validation_loss"] == min(losses.values())
        inside = min(losses) < chosen["learning_rate"] < max(losses)
        assert inside != chosen["at_edge"]
        row = {"learning_rate": chosen["learning_rate"], "steps": 2, "seed": 9}
        last = finished.by_hand(row, *CONTENDERS[name])["held_out"][-1]
        assert last["validation_loss"] == chosen["validation_loss"] != last["loss"]


@SHARING
def test_the_report_has_tables_plots_and_the_settings(finished: Workplace) -> None:
    text = (finished.report / "report.md").read_text()
    for part in (
        "## Equal tokens",
        "## Equal FLOPs",
        "## Tuned learning rates",
        "scripts/study tiny",
        "forgetting loss",
    ):
        assert part in text, part
    assert "diverged" not in text.partition("## What")[0]
    html = (finished.report / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert finished.results()["base"]["loss"] == pytest.approx(_base_loss(finished), rel=1e-5)


def _base_loss(place: Workplace) -> float:
    """The base model's mean loss per target on the held-out blocks, as transformers alone computes it."""
    import torch
    from transformers import AutoModelForCausalLM

    root = place.directory / "outputs" / "artifacts"
    (load,), (corpus,) = (list((root / stage).glob("*/manifest.json")) for stage in ("load", "tokenize"))
    model = AutoModelForCausalLM.from_pretrained(load.parent, dtype=torch.float32, attn_implementation="eager")
    total, count = 0.0, 0
    ids, positions, mask = (
        np.load(corpus.parent / f"held_out.{name}.npy") for name in ("input_ids", "position_ids", "loss_mask")
    )
    chosen = np.arange(2) * len(ids) // 2  # held_out_blocks=2, evenly spaced
    for block in chosen:
        starts = [*np.flatnonzero(positions[block] == 0), len(ids[block])]
        for begin, end in pairwise(starts):  # documents do not attend to each other
            tokens = torch.from_numpy(ids[block][begin:end].astype(np.int64))
            targets = torch.from_numpy(mask[block][begin + 1 : end].astype(bool))
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[targets]
            total, count = total + float(losses.sum()), count + int(targets.sum())
    return total / count


@SHARING
def test_errors_over_text_are_those_of_differences_of_blocks(finished: Workplace) -> None:
    """The two held-out blocks have equally many targets, so the error is half of the distance of their differences."""
    results = finished.results()
    for found in results["differences"]:
        name = {"held_out": "loss", "forgetting": "forgetting_loss"}[found["loss"]]
        by_block = dict[str, np.ndarray]()
        for contender in (found["contender"], STUDY["reference"]):
            rows = [row for row in results["rows"] if (row["contender"], row["budget"]) == (contender, found["budget"])]
            blocks = [finished.by_hand(row, *CONTENDERS[contender])["held_out"][-1]["blocks"][name] for row in rows]
            losses, targets = (np.array([block[key] for block in blocks]) for key in ("losses", "targets"))
            by_block[contender] = (losses / targets).mean(axis=0)
        one, two = by_block[found["contender"]] - by_block[STUDY["reference"]]
        assert found["stderr_over_text"] == pytest.approx(abs(one - two) / 2, rel=0.02, abs=1e-9)
    assert "over text" in (finished.report / "report.md").read_text()


@SHARING
def test_a_finished_study_does_nothing(finished: Workplace) -> None:
    before, losses = finished.artifacts(), finished.results()["rows"]
    assert finished.run() == EXIT_DONE
    assert finished.artifacts() == before and finished.results()["rows"] == losses


@SHARING
def test_new_contenders_run_alone_and_a_rate_at_which_training_diverges_is_not_chosen(
    finished: Workplace, one_worker: TrainingWorker
) -> None:
    before, expected = finished.artifacts(), finished.results()
    hot = {"overrides": ["expand=copy"], "learning_rates": [0.001, 1.0e30]}
    finished.write(contenders={**CONTENDERS, "average": ["expand=average"], "hot": hot})
    try:
        assert finished.run() == EXIT_DONE
        assert before.items() <= finished.artifacts().items()
        rows = finished.results()["rows"]
        assert [row for row in rows if row["contender"] in CONTENDERS] == expected["rows"]
        assert len(rows) == 2 * len(expected["rows"])
        losses = {
            row["learning_rate"]: row["validation_loss"]
            for row in finished.results()["tuning"]
            if row["contender"] == "hot"
        }
        assert losses[1.0e30] is None and losses[0.001] is not None
        assert "1e+30: diverged" in (finished.report / "report.md").read_text()
        tasks = one_worker.tasks
        assert finished.run() == EXIT_DONE and one_worker.tasks == tasks  # it is known to diverge
    finally:
        finished.write()
        assert finished.run() == EXIT_DONE


@SHARING
def test_a_study_that_lost_runs_repeats_only_these(finished: Workplace) -> None:
    """As after kill -9: some runs are finished, one is half finished, and others are missing."""
    expected, before = finished.results(), finished.artifacts()
    places = (finished.directory / "outputs" / "tiny" / name for name in CONTENDERS)
    used = {link.resolve().name for place in places for link in place.glob("rate-*/pretrain")}
    lost = sorted(used)[::3]
    for key in lost:
        shutil.rmtree(finished.directory / "outputs" / "artifacts" / "pretrain" / key)
    assert finished.run() == EXIT_DONE
    after = finished.artifacts()
    assert {key for key in before if after[key] == before[key]} == set(before) - set(lost)
    _without_seconds(expected), _without_seconds(again := finished.results())
    assert again["rows"] == expected["rows"] and again["tuning"] == expected["tuning"]


@SHARING
def test_a_report_repeats_the_command_and_shows_only_what_was_measured(
    arguments: list[str], one_worker: TrainingWorker, tmp_path: Path
) -> None:
    """Every run of a contender diverges, there is no text for forgetting, and the tokens are not whole steps."""
    place = Workplace(tmp_path, [item for item in arguments if not item.startswith("data.forgetting=")])
    hot = {"overrides": ["expand=copy"], "learning_rates": [1.0e30, 1.0e31]}
    place.write(name="renamed", contenders={"copy": ["expand=copy"], "hot": hot}, equal_flops=False, tokens=1000)
    assert place.run("study.tune.max_new_rates=0", "launch.threads=1", "action=run") == EXIT_DONE
    report = tmp_path / "outputs" / "renamed" / "report"
    text, results = (report / "report.md").read_text(), json.loads((report / "results.json").read_text())
    assert "Diverged, and therefore not compared: hot (2 of 2 seeds)." in text
    assert "orgetting" not in text.partition("## Reproduction")[0]
    assert "Final runs have 1,024 tokens (4 steps" in text and "1,000" not in text
    command = text.partition("## Reproduction")[2].partition("```bash\n")[2].partition("\n```")[0]
    name, *given = shlex.split(command)[1:]
    assert command.startswith("scripts/study tiny ") and name == "tiny"
    assert {f"--config-dir={tmp_path}", f"output_dir={tmp_path / 'outputs'}", "launch.threads=1"} <= {*given}
    assert "study.tune.max_new_rates=0" in given and "action=run" not in given
    assert results["arguments"] == ["+study=tiny", *given]
    tasks = one_worker.tasks
    assert main([f"+study={name}", *given]) == EXIT_DONE and one_worker.tasks == tasks
    assert (report / "report.md").read_text() == text


def _without_seconds(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        row.pop("seconds")


@SHARING
def test_the_choice_does_not_depend_on_the_held_out_text(
    finished: Workplace, arguments: list[str], tiny_corpus: Path, tmp_path: Path
) -> None:
    """Every held-out document is replaced. All validation losses stay the same, bit for bit, and so does the choice."""
    from pipeline.data.records import Drops, Example
    from pipeline.data.splits import Deduplicator

    splits = Deduplicator(0.2, validation_fraction=0.2)
    kept, replaced, number = [], 0, 0
    for line in tiny_corpus.read_text().splitlines():
        split = splits.assign(Example(json.loads(line)["text"], None), Drops())
        if split == "held_out":
            while splits.assign(Example(text := f"Other words, {number} of them.", None), Drops()) != "held_out":
                number += 1
            kept, replaced, number = [*kept, json.dumps({"text": text})], replaced + 1, number + 1
        else:
            kept.append(line)
    assert replaced
    (tmp_path / "changed.jsonl").write_text("\n".join(kept))
    changed = [
        f"data.corpus.path={tmp_path / 'changed.jsonl'}" if "data.corpus.path" in item else item for item in arguments
    ]
    place = Workplace(tmp_path / "study", changed)
    place.write(equal_flops=False, seeds=[0, 1])
    assert place.run() == EXIT_DONE
    ours, theirs = place.results(), finished.results()
    assert ours["tuning"] == theirs["tuning"]
    losses = [[row["held_out_loss"] for row in found["rows"] if row["budget"] == "tokens"] for found in (ours, theirs)]
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------------- messages


@pytest.fixture
def place(arguments: list[str], tmp_path: Path) -> Workplace:
    """A study that was not started."""
    return Workplace(tmp_path, arguments)


def test_a_plan_prints_the_cost_and_changes_nothing(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.write()
    assert place.run("action=plan") == EXIT_DONE
    printed = capsys.readouterr().out
    assert "2 of 4 steps" in printed and "no blockers found" in printed
    assert not (place.directory / "outputs").exists()


def test_a_plan_prints_a_blocker_once_for_all_contenders(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.write()
    assert place.run("action=plan", "data.corpus.path=/none.jsonl") == EXIT_DONE
    printed = capsys.readouterr().out
    assert printed.count("/none.jsonl") == 1 and "every contender: data.corpus.path = /none.jsonl" in printed


@pytest.mark.parametrize(
    ("changes", "further", "expected"),
    [
        ({"reference": "nobody"}, [], "it must be one of the contenders copy, untouched"),
        ({"seeds": [9, 1]}, [], "rates would be selected for the seeds they are compared on"),
        ({"common": ["+experiment=quickstart", "seed=3"]}, [], "a study sets this itself"),
        ({}, ["pretrain.steps=7"], "a study sets this itself"),
        ({}, ["data.validation_fraction=0.0"], "not on the held-out one"),
        ({"contenders": {**CONTENDERS, "x": ["expand=copy", "data.chat_template=plain"]}}, [], "cannot be compared"),
        ({"contenders": {**CONTENDERS, "x": ["expand=copyy"]}}, [], "there is no such method"),
        ({"contenders": {**CONTENDERS, "report": ["expand=copy"]}}, [], "entry of the directory of another run"),
        ({"contenders": {**CONTENDERS, "x": ["expand=copy", "pretrain.trainable=nothing"]}}, [], "no parameter"),
        ({}, ["action=clean"], "a study supports only"),
        ({"tune": {**STUDY["tune"], "learning_rates": [0.1, 0.01]}}, [], "they must ascend"),
        ({}, ["study.tokns=7"], "there is no such setting"),
        ({}, ["study.seeds.0=7"], "study.seeds has no settings of its own, and is only set as a whole"),
        ({}, ["study.tune.learning_rates.0=1e-4"], "Set study.tune.learning_rates=[VALUE,...]"),
        ({}, ["study.tokens.x=1"], "Set study.tokens=VALUE"),
        ({}, ["study.contenders.copy.overrides.0=expand=average"], "study.contenders.copy.overrides has no settings"),
        ({"extends": "tiny"}, [], "a study cannot extend itself"),
        ({"extends": "first"}, [], "a study cannot extend itself"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message_before_anything_starts(
    place: Workplace, changes: Any, further: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(**changes)
    (place.directory / "study" / "first.yaml").write_text("{extends: second}")
    (place.directory / "study" / "second.yaml").write_text("{extends: tiny}")
    assert place.run(*further) == EXIT_REQUEST
    assert expected in capsys.readouterr().err
    assert not list((place.directory / "outputs").rglob("manifest.json"))


@pytest.mark.parametrize("name", list_choices("study", [CONF]))
def test_every_study_composes(name: str) -> None:
    """Every contender has valid settings, and the pages that describe the study name it.

    The contenders of an extended study are composed with that study, and here only its reference.
    """
    study, overrides = load_study([f"+study={name}"], [CONF])
    assert study.name == name and not overrides
    own = yaml.safe_load((CONF / "study" / f"{name}.yaml").read_text()).get("contenders", {})
    settings = [
        compose_jobs([*study.common, *contender.overrides], False, None)[0].settings
        for contender_name, contender in study.contenders.items()
        if contender_name in {*own, study.reference}
    ]
    assert len({each.model_dump_json() for each in settings}) == len(settings)
    assert all(each.data.validation_fraction > 0 for each in settings)
    assert f"scripts/study {name}" in (CONF.parent.parent / "docs" / "study.md").read_text()


def test_a_study_extends_another_and_command_lines_change_it(place: Workplace) -> None:
    place.write()
    mine = {"extends": "tiny", "common": ["expand.new_layers=1"], "contenders": {"mine": ["expand=average"]}}
    (place.directory / "study" / "mine.yaml").write_text(yaml.safe_dump(mine))
    given = ["+study=mine", "study.tune.learning_rates=[1e-4,0.001]", "study.tokens=512", "output_dir=elsewhere"]
    study, rest = load_study(given, [CONF, place.directory])
    assert list(study.contenders) == [*CONTENDERS, "mine"] and study.name == "tiny"
    assert study.common == [*STUDY["common"], "expand.new_layers=1"]
    assert study.tune.learning_rates == [1e-4, 0.001] and study.tokens == 512
    assert rest == ["output_dir=elsewhere"]
    rates = ["study.contenders.copy.learning_rates=[1e-3,1e-2]", "study.contenders.new=[expand=lesa]"]
    study, _ = load_study([*given, *rates], [CONF, place.directory])
    assert study.contenders["copy"].overrides == CONTENDERS["copy"] and study.rates_of("copy") == [1e-3, 1e-2]
    assert study.contenders["new"].overrides == ["expand=lesa"]
