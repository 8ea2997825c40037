"""The files of a report: for one run, for a sweep, and with stages missing."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.files import read_json
from pipeline.report import RunArtifacts, write_report
from tests.report.finished_runs import MEASURED_BLOCKS, STAGES, finished_run, with_other_data, write

ALL_PLOTS = {"scores.png", "held_out_loss.png", "training_loss.png", "layers.png", "seconds.png"}
TEXTS = {"report.md", "report.html", "results.json", "paired_differences.json"}


def _write(runs: list[RunArtifacts], out: Path) -> str:
    out.mkdir()
    write_report(runs, out)
    return (out / "report.md").read_text()


def _headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


def _links(page: str) -> list[str]:
    return re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    _write([finished_run(root / "runs")], root / "out")
    return root / "out"


def test_a_report_consists_of_these_files(report: Path) -> None:
    assert {path.name for path in report.iterdir()} == ALL_PLOTS | TEXTS


def test_one_run_has_every_section(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert text.startswith(
        "# quickstart: expanded from 6 to 8 layers with LESA\n\n> Expanded from 6 to 8 layers with LESA."
    )
    assert _headings(text) == [
        "Scores", "Held-out loss", "Training", "The new layers", "Cost", "What these numbers do not show",
        "Reproduction",
    ]  # fmt: skip
    assert "4 ← 3+4, 6 ← 4+5" in text.replace("**", "")
    assert "commit `" + "0" * 40 + "`; torch 2.13.0" in text


def test_the_change_of_held_out_losses_is_below_their_table(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "runs", method, method, blocks=MEASURED_BLOCKS) for method in ("lesa", "copy")]
    text = _write(runs, tmp_path / "out")
    changes = (
        "From the first to the last measurement, the loss of LESA fell by 1.00 ± 0.10, paired over 2 blocks; the loss "
        "of copying fell by 1.00 ± 0.10, paired over 2 blocks."
    )
    assert text.count(changes) == 2  # in pre-training and in tuning


def test_curves_say_that_they_show_the_weights_where_averages_are_the_result(tmp_path: Path) -> None:
    text = _write([finished_run(tmp_path / "runs", averages=3.1)], tmp_path / "out")
    assert "The result of LESA is the averages of the weights (`ema_decay`)" in text
    assert re.search(r"^\| averages +\| +1,000 +\| +3.100", text, re.MULTILINE)
    assert "averages" not in _write([finished_run(tmp_path / "plain")], tmp_path / "other")


def test_the_returned_results_are_those_of_results_json(tmp_path: Path) -> None:
    rows = write_report([finished_run(tmp_path / "runs", stages=["load", "expand"])], tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_the_html_page_needs_no_other_file_and_no_network(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert len(_links(page)) == len(ALL_PLOTS)
    assert all(link.startswith(("data:", "#")) for link in _links(page))
    assert "<link" not in page and "@import" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert not re.search(r"https?:|fetch|import|XMLHttp|cookie|Storage", script)


def test_plots_are_wide_enough_for_a_readme(report: Path) -> None:
    for name in ALL_PLOTS:
        width, height = struct.unpack(">II", (report / name).read_bytes()[16:24])
        assert width == 1800 and height >= 250


def test_a_sweep_compares_its_methods_side_by_side(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "runs", f"sweep/expand-{m}", m) for m in ("lesa", "none", "solar")]
    text = _write(runs, tmp_path / "out")
    assert text.startswith("# sweep: 3 runs side by side")
    for heading in ("pre-trained", "expanded", "tuned"):
        assert f"### Methods side by side: {heading}" in text
    assert "### At equal budgets" in text and "LESA, SOLAR" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == ALL_PLOTS
    assert text.count("### Settings: load\n") == 1


def test_runs_on_different_held_out_blocks_have_tables_and_plots_of_their_own(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path / name[0], name, method, stages=STAGES[:6], blocks=MEASURED_BLOCKS)
        for name, method in (("1a", "lesa"), ("1b", "copy"), ("2c", "solar"))
    ]
    with_other_data(runs[0], "tokenize/corpus", held_out_fraction=0.2)
    with_other_data(runs[2], "tokenize/corpus", held_out_fraction=0.4)
    with_other_data(runs[2], "tokenize/instructions", held_out_fraction=0.4)
    text = _write(runs, tmp_path / "out")
    assert "### Measurements: LESA, copying (held_out_fraction=0.2)" in text
    assert "### Measurements: SOLAR (held_out_fraction=0.4)" in text
    assert text.count("### At equal budgets") == 1
    assert "### At equal budgets: LESA, copying" in text
    assert len(re.findall(r"^Held-out loss of .+ on conversations", text, re.MULTILINE)) == 2
    rows = re.findall(r"^\| +(?:0|100) % .+$", text, re.MULTILINE)
    assert [row.count("|") for row in rows] == [5, 5, 4, 4] * 2
    _, one = struct.unpack(">II", (tmp_path / "out" / "held_out_loss.png").read_bytes()[16:24])
    _write(runs[:2], tmp_path / "same")
    _, other = struct.unpack(">II", (tmp_path / "same" / "held_out_loss.png").read_bytes()[16:24])
    assert one == 2 * other


@pytest.mark.parametrize(
    ("stages", "headings", "plots"),
    [
        (["load"], ["Cost"], {"seconds.png"}),
        (["load", "evaluate/load"], ["Scores", "Cost"], {"scores.png", "seconds.png"}),
        (["load", "expand"], ["The new layers", "Cost"], {"layers.png", "seconds.png"}),
        (
            ["load", "expand", "tokenize/corpus", "pretrain"],
            ["Held-out loss", "Training", "The new layers", "Cost"],
            ALL_PLOTS - {"scores.png"},
        ),
        (STAGES[:-1], ["Scores", "Held-out loss", "Training", "The new layers", "Cost"], ALL_PLOTS),
        ([], [], set()),
    ],
)
def test_sections_of_missing_stages_are_left_out(
    tmp_path: Path, stages: list[str], headings: list[str], plots: set[str]
) -> None:
    text = _write([finished_run(tmp_path / "runs", stages=stages)], tmp_path / "out")
    always = ["What these numbers do not show", "Reproduction"] if stages else ["What these numbers do not show"]
    assert _headings(text) == headings + always
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == plots
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == plots


def test_the_control_has_no_section_on_new_layers(tmp_path: Path) -> None:
    text = _write([finished_run(tmp_path / "runs", method="none")], tmp_path / "out")
    assert "The new layers" not in text
    assert text.startswith("# quickstart: the base model, not expanded")


def test_a_ranking_of_the_layers_is_drawn_once_for_all_runs_that_share_it(tmp_path: Path) -> None:
    """Among the new layers, or by itself where layers of the base train instead."""
    runs = [finished_run(tmp_path, name, method) for name, method in (("a", "copy"), ("b", "average"), ("c", "none"))]
    ranking = {"position": "least_important", "measure": "increase of the loss", "values": [9.0, 0.3, 0.2, 0.1, 0.1, 2],
               "errors": [0.1] * 6, "tokens": 50, "loss": 3.0}  # fmt: skip
    assert "ranking.png" not in _write(runs, tmp_path / "without")
    for run in runs:
        manifest = read_json(run.directories["expand"] / "manifest.json")
        manifest["metrics"]["ranking"] = ranking
        write(run.directories["expand"] / "manifest.json", manifest)
    assert all(run.chosen_layers() == {3, 4} for run in runs[:2])
    text = _write(runs, tmp_path / "all")
    assert text.count("ranking.png") == 1 and (tmp_path / "all" / "ranking.png").is_file()
    control = _write(runs[2:], tmp_path / "control")
    assert "## The layers that train" in control and "ranking.png" in control


def test_the_report_states_what_the_expansion_stage_verified_and_its_warnings(tmp_path: Path) -> None:
    warned = finished_run(tmp_path / "runs", method="opt_deus", stages=["load", "expand"], warnings=["3 of 7 <broke>"])
    text = _write([warned], tmp_path / "out")
    assert (
        "**OpT-DeUS** computes the same outputs as the base model: logits differ by at most 2e-07 of the largest; "
        "3 of 7 \\<broke" in text
    )
    changed = _write([finished_run(tmp_path / "runs", stages=["load", "expand"])], tmp_path / "other")
    assert "**LESA** does not compute the same outputs as the base model" in changed


def test_scores_without_standard_errors_have_no_marks(tmp_path: Path) -> None:
    scores = {
        (f"task|{i}", "acc"): (9, None, {"load": 0.5, "expand": 0.4, "pretrain": 0.6, "sft": 0.7}) for i in range(14)
    }
    scored = ["evaluate/load", "evaluate/pretrain"]
    text = _write([finished_run(tmp_path / "runs", stages=scored, scores=scores)], tmp_path / "out")
    assert "task\\|13" in text
    assert not re.search(r"\d % [▲▼≈]", text)


def test_importing_the_package_imports_neither_matplotlib_nor_torch() -> None:
    program = "import sys, pipeline.report; print({'matplotlib', 'torch', 'markdown_it.main'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "matplotlib" not in answer.stdout and "torch" not in answer.stdout


def test_text_from_manifests_cannot_become_markup(tmp_path: Path) -> None:
    """Names of runs, models, methods and tasks, notes, image paths and everything else in the JSON files."""
    evil = "<script>x()</script> \"'`*_a_ [l](file:///etc/passwd) ![i](../../secret.png) | $\\frac{ &lt;b\n\n# head"
    scores = {(f"task {evil}", f"metric {evil}"): (40, 0.4, dict.fromkeys(("load", "expand", "pretrain", "sft"), 35.0))}
    runs = []
    for number in range(2):
        run = finished_run(tmp_path / "runs", name=f"run{number}", scores=scores, warnings=[evil])
        for directory in run.directories.values():
            for file in directory.glob("*.json"):
                content = json.loads(file.read_text())
                for name in ("git_commit", "title", "precision", "prompt_format"):
                    content |= {name: evil} if name in content or name == "title" else {}
                content |= {"packages": {evil: evil}, "seed": evil} if "packages" in content else {}
                if file.name == "manifest.json":
                    content["settings"] |= {"path": f"{evil}\n```\n{evil}"}
                    content["metrics"]["warnings"] = [evil]
                file.write_text(json.dumps(content))
        runs.append(replace(run, name=f"{evil} {number}"))
    (tmp_path / "secret.png").write_text("secret")
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        text = _write(runs[:count], out)
        page = (out / "report.html").read_text()
        assert page.count("<script") == 1 and "<script" not in page.partition("</main>")[0]
        assert "&lt;script&gt;x()" in page and "&amp;lt;b" in page
        assert all(link.startswith("data:image/png;base64,") for link in _links(page)), _links(page)
        assert page.count("<img") == len(list(out.glob("*.png")))
        assert "<h1>head" not in page and "<em>a</em>" not in page and "<h1>" in page
        assert page.count("<h1>") == 1
        assert text.count("# head") > 3  # nothing is left out


def test_the_answers_of_all_models_stand_beside_those_of_the_data(tmp_path: Path) -> None:
    """In a sweep, the base answers once. What a model writes is text, not Markdown."""
    runs = [finished_run(tmp_path, name, name) for name in ("lesa", "copy")]
    for run in runs:
        directory = tmp_path / run.name / "evaluate" / "answers"
        for target in ("load", "sft"):
            said = "from the base" if target == "load" else f"**{run.name}** | <b>"
            answer = {
                "question": "What is a list?",
                "reference": "A sequence.",
                "answer": said,
                "ended": target == "load",
            }
            write(directory / "answers" / f"{target}.json", [answer])
        shutil.copy(tmp_path / "shared" / "load" / "manifest.json", directory)
        dict.__setitem__(run.directories, "evaluate/answers", directory)  # type: ignore[arg-type]
    text = _write(runs, tmp_path / "out")
    section = text.partition("## The same questions, answered by every model")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([^-].+?) +\| (.+?) +\|$", section, re.MULTILINE)
    assert cells == [
        ("model", "answer"),
        ("in the data", "A sequence."),
        ("base", "from the base"),
        ("LESA, tuned", r"\*\*lesa\*\* \| \<b\> …"),
        ("copying, tuned", r"\*\*copy\*\* \| \<b\> …"),
    ]
