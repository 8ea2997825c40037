"""The whole job from load to report, on a tiny model, through the command line a user types."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.__main__ import CONF
from pipeline.config.messages import list_experiments
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED
from pipeline.files import read_json, sha256_file
from tests.processes import children, is_gone, seconds_of_children

REPOSITORY = Path(__file__).resolve().parent.parent


def start(*arguments: str, cwd: Path, threads: int = 1, path: Sequence[Path] = ()) -> subprocess.Popen[str]:
    """The pipeline in a process of its own, output captured; ``path`` goes before the repository on its path."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY])),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*arguments: str, cwd: Path, threads: int = 1, path: Sequence[Path] = ()) -> tuple[int, str]:
    """Exit code and output of one finished command."""
    process = start(*arguments, cwd=cwd, threads=threads, path=path)
    output, _ = process.communicate()
    return process.returncode, output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output directory for the module: experiments share what they can."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("experiment", list_experiments([CONF]))
def test_every_experiment_runs_from_load_to_report(experiment: str, shrunk: list[str], outputs: Path) -> None:
    status, output = run(f"+experiment={experiment}", *shrunk, cwd=outputs)
    assert status == EXIT_DONE, output
    report = outputs / "outputs" / experiment / "report"
    rows = json.loads((report / "results.json").read_text())
    assert {row["target"] for row in rows} >= {"load", "expand", "pretrain", "sft"}
    assert set(rows[0]) == {"run", "method", "target", "task", "metric", "value", "stderr", "n"}
    assert (report / "report.md").exists() and (report / "report.html").exists() and list(report.glob("*.png"))
    assert "seconds by stage" in output


def test_a_finished_command_does_nothing_and_needs_no_torch(shrunk: list[str], outputs: Path) -> None:
    command = ["+experiment=quickstart", *shrunk]
    assert run(*command, cwd=outputs)[0] == EXIT_DONE
    probe = (
        "import sys; from pipeline.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'wandb', 'deepspeed'} & set(sys.modules); print('imported', sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before = seconds_of_children()
    answer = subprocess.run(
        [sys.executable, "-c", probe, *command], cwd=outputs, env=environment, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert "everything is there" in answer.stdout, answer.stdout + answer.stderr
    assert "imported []" in answer.stdout
    assert seconds_of_children() - before < 5.0


def test_force_redoes_a_stage_and_what_hangs_on_it(shrunk: list[str], outputs: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[load,expand,tokenize]"]
    assert run(*command, cwd=outputs)[0] == EXIT_DONE
    load, expand = (outputs / "outputs" / "quickstart" / stage / "manifest.json" for stage in ("load", "expand"))
    before = load.stat().st_mtime_ns, expand.stat().st_mtime_ns
    assert run(*command, "force=[expand]", cwd=outputs)[0] == EXIT_DONE
    assert load.stat().st_mtime_ns == before[0]
    assert expand.stat().st_mtime_ns > before[1]


def test_status_and_plan_change_nothing(shrunk: list[str], tmp_path: Path) -> None:
    for action in ("status", "plan"):
        status, output = run("+experiment=quickstart", *shrunk, f"action={action}", cwd=tmp_path)
        assert status == EXIT_DONE, output
        assert "pretrain" in output
    assert not list((tmp_path / "outputs").rglob("manifest.json"))


def test_a_sweep_shares_artifacts_and_has_one_report(shrunk: list[str], outputs: Path) -> None:
    command = ["--multirun", "+experiment=quickstart", "expand=copy,none", *shrunk, "name=sweep"]
    status, output = run(*command, cwd=outputs)
    assert status == EXIT_DONE, output
    base = outputs / "outputs" / "sweep"
    rows = json.loads((base / "report" / "results.json").read_text())
    assert {row["method"] for row in rows} == {"copy", "none"}
    assert (base / "expand-copy" / "load").resolve() == (base / "expand-none" / "load").resolve()


def _weights(run_directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted((run_directory / "sft").resolve().glob("*.safetensors"))}


def test_killed_again_and_again_it_ends_with_the_uninterrupted_result(shrunk: list[str], tmp_path: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[sft]"]
    assert run(*command, "output_dir=whole", cwd=tmp_path)[0] == EXIT_DONE
    kills, patience = 0, 4.0
    while True:
        process = start(*command, "output_dir=broken", cwd=tmp_path)
        try:
            output, _ = process.communicate(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            _kill_tree(process.pid)
            process.communicate()
            kills, patience = kills + 1, patience + 3.0
    assert process.returncode == EXIT_DONE, output
    assert kills >= 3
    assert _weights(tmp_path / "broken" / "quickstart") == _weights(tmp_path / "whole" / "quickstart")
    assert not list((tmp_path / "broken").rglob("*.partial"))


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not is_gone(pid)]


def _kill_tree(pid: int) -> None:
    for victim in [pid, *children(pid)]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _metrics_of(stage: Path, seconds: float = 300.0) -> Path:
    """The log of the one artifact of a stage that is being built, once it is there."""
    deadline = time.monotonic() + seconds
    while not (found := list(stage.glob("*.partial/metrics.jsonl"))):  # not rglob: directories come and go below
        assert time.monotonic() < deadline, "no step was ever logged"
        time.sleep(0.05)
    return found[0]


def test_when_the_driver_alone_is_killed_its_workers_are_gone_within_ten_seconds(
    shrunk: list[str], tmp_path: Path
) -> None:
    process = start("+experiment=quickstart", *shrunk, "pretrain.steps=100000", cwd=tmp_path)
    _metrics_of(tmp_path / "outputs" / "artifacts" / "pretrain")
    workers = children(process.pid)
    assert len(workers) >= 2, "torchrun and one worker"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10.0
    while _alive(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(workers) == []


def _last_step(metrics: Path) -> int:
    return max((json.loads(line)["step"] for line in metrics.read_text().split("\n")[:-1]), default=0)


def test_a_stopped_run_saves_says_so_and_goes_on(shrunk: list[str], tmp_path: Path) -> None:
    """By a signal to the driver, and by one to a worker that the driver did not send."""
    command = ["+experiment=quickstart", *shrunk, "stages=[pretrain]", "pretrain.steps=400"]
    place = tmp_path / "outputs" / "artifacts" / "pretrain"
    stopped_after = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(*command, cwd=tmp_path)
        metrics = _metrics_of(place)
        while _last_step(metrics) <= stopped_after:
            time.sleep(0.01)
        workers = [pid for pid in children(process.pid) if "pipeline.training.worker" in _name_of(pid)]
        os.kill(process.pid if number == signal.SIGTERM else workers[-1], number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == EXIT_STOPPED, output
        assert "the same command goes on" in output
        stopped_after = _last_step(metrics)
    status, output = run(*command, cwd=tmp_path)
    assert status == EXIT_DONE, output
    assert "resume" in output
    manifest = read_json(tmp_path / "outputs" / "quickstart" / "pretrain" / "manifest.json")
    assert manifest["attempts"] == 3 and manifest["seconds"] > manifest["metrics"]["seconds"]


def test_a_killed_worker_ends_the_run_with_one_message(shrunk: list[str], tmp_path: Path) -> None:
    """Which rank, how, its last lines, its log; exit code 1, no traceback, nobody left behind."""
    command = ["+experiment=quickstart", *shrunk, "stages=[pretrain]", "pretrain.steps=100000", "launch.processes=2"]
    process = start(*command, cwd=tmp_path)
    _metrics_of(tmp_path / "outputs" / "artifacts" / "pretrain")
    family = children(process.pid)
    os.kill(_rank(1, family), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAILED, output
    message = output[output.index("rank 1 of 2: killed by SIGKILL") :]
    assert "  | " in message and "rank-1.log" in message
    assert "Traceback" not in output
    assert _alive(family) == []
    assert "rank 1 of 2: killed by SIGKILL" in run(*command, "action=status", cwd=tmp_path)[1]


def _rank(rank: int, processes: list[int]) -> int:
    """The process among these that is a worker of that rank."""
    found = [pid for pid in processes if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return found[0]


def test_two_runs_of_the_same_at_once_build_it_once(shrunk: list[str], tmp_path: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[expand]", "expand=copy"]
    processes = [start(*command, cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_DONE, EXIT_DONE], outputs
    for stage in ("load", "expand"):
        assert sorted(len(re.findall(rf"^ *done +{stage} ", output, re.MULTILINE)) for output in outputs) == [0, 1]
    assert any(re.search(r"waits +\w+ +process \d+ on .* is building it", output) for output in outputs), outputs
    assert not list(tmp_path.glob("outputs/artifacts/*/*.partial"))


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


PLAIN_USER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (kind.from_pretrained("model") for kind in (AutoTokenizer, AutoModelForCausalLM))
chat = [{"role": "user", "content": "What is item 3?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
assert answer.shape[1] > prompt["input_ids"].shape[1]
assert not any(name == "pipeline" or name.startswith("pipeline.") for name in sys.modules)
"""


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_trained_model_is_any_transformers_users_wherever_it_lies(
    stage: str, shrunk: list[str], outputs: Path, tmp_path: Path
) -> None:
    """Copied elsewhere, and loaded by a process that knows nothing of this package."""
    assert run("+experiment=quickstart", *shrunk, cwd=outputs)[0] == EXIT_DONE
    shutil.copytree((outputs / "outputs" / "quickstart" / stage).resolve(), tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_USER], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr


def test_snapshots_are_scored_and_reported(shrunk: list[str], outputs: Path) -> None:
    targets = "evaluate.targets=[load,expand,pretrain@33%,pretrain@67%,pretrain,sft]"
    status, output = run("+experiment=quickstart", *shrunk, "seed=5", "name=way", targets, cwd=outputs)
    assert status == EXIT_DONE, output
    way = outputs / "outputs" / "way"
    rows = json.loads((way / "report" / "results.json").read_text())
    scores = {row["target"]: row["value"] for row in rows if row["metric"] == "byte_perplexity"}
    assert list(scores) == ["load", "expand", "pretrain@33%", "pretrain@67%", "pretrain", "sft"]
    assert len(set(scores.values())) >= 5  # each its own model, though surgery may keep the base's numbers
    assert {path.name for path in (way / "evaluate").iterdir()} >= {"pretrain-at-33", "pretrain-at-67"}
    assert not list(way.rglob("*%*"))
    assert "pre-trained, 33 %" in (way / "report" / "report.md").read_text()
    status, output = run(
        "+experiment=quickstart", *shrunk, "seed=5", "name=way", "evaluate.targets=[pretrain@50%]", cwd=outputs
    )
    assert status == EXIT_REQUEST
    assert "pretrain is finished and saved no snapshot there" in output and "force=[pretrain]" in output
