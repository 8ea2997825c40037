"""Complete runs from load to report on a tiny model, started from the command line as a user does.

Every process of the first one is monitored: nothing is pickled or unpickled, and no token reaches a file.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import CONF, compose_jobs, main
from pipeline.config.messages import list_choices
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED
from pipeline.files import read_json
from pipeline.planning import prepare
from pipeline.planning.training import plan_training
from tests import warm
from tests.processes import children, is_gone, listening_addresses, seconds_of_children

REPOSITORY = Path(__file__).resolve().parent.parent
SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef"}

# Installed as sitecustomize.py, which Python imports at the start of every process, and the warm server before its
# imports and in every fork.
MONITOR = """
import os, pickle, sys, traceback

def forbid(name):
    def forbidden(*arguments, **details):
        with open(os.environ["PIPELINE_TEST_PICKLES"], "a") as log:
            log.write(name + "\\n" + "".join(traceback.format_stack(limit=4)) + "\\n")
        raise AssertionError(f"{name} was called")
    return forbidden

pickle.load, pickle.dump = forbid("pickle.load"), forbid("pickle.dump")
if {"pipeline.stages", "pipeline.training.worker"} & set(sys.orig_argv):
    import torch
    torch.load, torch.save = forbid("torch.load"), forbid("torch.save")
if {"pipeline", "pipeline.training.worker"} & set(sys.orig_argv):
    pickle.loads = forbid("pickle.loads")
    sys.addaudithook(lambda event, _: event == "pickle.find_class" and forbid(event)())  # by whatever means
with open(os.environ["PIPELINE_TEST_PICKLES"] + ".started", "a") as log:
    log.write(" ".join(sys.orig_argv) + "\\n")
"""
SHARING = pytest.mark.xdist_group("outputs")  # one pytest worker runs these tests, so that they share artifacts


def start(
    *arguments: str, cwd: Path, threads: int = 1, path: Sequence[Path] = (), stdin: int | None = None
) -> subprocess.Popen[str]:
    """Starts the pipeline in its own process with captured output. ``path`` precedes the repository in PYTHONPATH."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY])),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*arguments: str, cwd: Path, threads: int = 1, path: Sequence[Path] = ()) -> tuple[int, str]:
    """Runs a command, and returns its exit code and output."""
    process = start(*arguments, cwd=cwd, threads=threads, path=path)
    output, _ = process.communicate()
    return process.returncode, output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory for the tests marked ``SHARING``."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def finished(shrunk: list[str], outputs: Path) -> str:
    """The output of a complete run in ``outputs``. A forbidden call would have written the file ``pickles`` there."""
    (outputs / "site").mkdir()
    (outputs / "tmp").mkdir()
    (outputs / "site" / "sitecustomize.py").write_text(MONITOR)
    client = warm.install(site=outputs / "site" / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        environment.setenv("PIPELINE_TEST_PICKLES", str(outputs / "pickles"))
        environment.setenv("TMPDIR", str(outputs / "tmp"))
        environment.setattr(sys, "executable", str(client))
        command = ["+experiment=quickstart", *shrunk, "tracking=offline"]
        status, output = run(*command, cwd=outputs, path=[outputs / "site"])
    assert status == EXIT_DONE, output
    (outputs / "terminal.txt").write_text(output)
    return output


@SHARING
def test_a_run_from_load_to_report(finished: str, outputs: Path) -> None:
    report = outputs / "outputs" / "quickstart" / "report"
    rows = json.loads((report / "results.json").read_text())
    assert {row["target"] for row in rows} >= {"load", "expand", "pretrain", "sft"}
    assert set(rows[0]) == {
        "run", "method", "target", "task", "metric", "value", "stderr", "n", "higher_is_better", "scores_of", "backend",
    }  # fmt: skip
    assert (report / "report.md").exists() and (report / "report.html").exists() and list(report.glob("*.png"))
    assert "seconds by stage" in finished


@SHARING
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_plan_counts_the_flops_that_training_counts(
    stage: str, shrunk: list[str], finished: str, outputs: Path
) -> None:
    """From the token blocks: padding passes through the layers, and not through the head."""
    command = ["+experiment=quickstart", *shrunk, f"output_dir={outputs / 'outputs'}"]
    (prepared,) = prepare([compose_jobs(command, False, None)[0].settings])
    planned = plan_training(prepared, stage)
    counted = read_json(prepared.nodes[stage].artifact.path / "training.json")["flops"]
    assert planned is not None and planned.flops == pytest.approx(counted, rel=0.005)


@SHARING
def test_no_pickle_is_written_or_read(finished: str, outputs: Path) -> None:
    started = (outputs / "pickles.started").read_text()
    assert "pipeline.stages" in started and "pipeline.training.worker" in started
    assert not (outputs / "pickles").exists(), (outputs / "pickles").read_text()


@SHARING
def test_no_temporary_file_is_left(finished: str, outputs: Path) -> None:
    assert not list((outputs / "tmp").iterdir())


@SHARING
def test_no_token_is_written_to_a_file_or_the_terminal(finished: str, outputs: Path) -> None:
    files = [path for path in outputs.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@SHARING
def test_reused_scores_are_those_of_scoring_the_model_itself(shrunk: list[str], finished: str, outputs: Path) -> None:
    """LLaMA Pro keeps the logits of the base."""

    def samples() -> list[object]:
        files = sorted((outputs / "outputs" / "quickstart" / "evaluate" / "expand" / "tasks").glob("*.json"))
        return [read_json(file)["samples"] for file in files]

    assert "scores of load, which has the same logits" in finished
    reused = samples()
    command = ["+experiment=quickstart", *shrunk, "stages=[evaluate]", "evaluate.targets=[load,expand]"]
    status, output = run(*command, "force=[evaluate]", "evaluate.rescore=true", cwd=outputs)
    assert status == EXIT_DONE and "same logits" not in output, output
    assert samples() == reused != []


@SHARING
def test_models_that_are_scored_at_the_same_time_have_the_same_scores(
    shrunk: list[str], finished: str, outputs: Path
) -> None:
    evaluations = outputs / "outputs" / "quickstart" / "evaluate"

    def results() -> dict[str, object]:
        files = sorted(evaluations.glob("*/tasks/*.json"))
        kept = ("rows", "samples", "first_tokens")
        return {str(file.relative_to(evaluations)): [read_json(file)[name] for name in kept] for file in files}

    one_by_one = results()
    command = ["+experiment=quickstart", *shrunk, "stages=[evaluate]", "force=[evaluate]", "evaluate.processes=2"]
    status, output = run(*command, cwd=outputs)
    assert status == EXIT_DONE, output
    assert re.search(r"build +evaluate/(\w+) (?:(?!done).)*build +evaluate/(?!\1)", output, re.DOTALL), output
    assert results() == one_by_one and {name.partition("/")[0] for name in one_by_one} >= {"load", "pretrain", "sft"}


@pytest.mark.parametrize("experiment", list_choices("experiment", [CONF]))
def test_every_experiment_can_be_planned_on_other_inputs(
    experiment: str, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checks of a run pass, with the real files of a model and data of the user's own."""
    position = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())["expand"].get("position")
    lists_gaps = isinstance(position, list)  # which a smaller model does not have
    changes = [*shrunk, *(["expand.position=top"] if lists_gaps else []), f"output_dir={tmp_path}"]
    assert main([f"+experiment={experiment}", *changes, "action=plan"]) == EXIT_DONE
    output = capsys.readouterr().out
    assert "blocks" not in output and all(stage in output for stage in ("load", "expand", "pretrain", "sft", "report"))


@SHARING
def test_a_finished_command_does_nothing_and_needs_no_torch(shrunk: list[str], finished: str, outputs: Path) -> None:
    command = ["+experiment=quickstart", *shrunk]
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
    assert "all artifacts are complete" in answer.stdout, answer.stdout + answer.stderr
    assert "imported []" in answer.stdout
    assert seconds_of_children() - before < 5.0


@SHARING
def test_force_rebuilds_a_stage_and_its_descendants(shrunk: list[str], finished: str, outputs: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[load,expand,tokenize]"]
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


@SHARING
def test_a_dry_run_of_an_upload_lists_the_model_and_its_card(
    shrunk: list[str], finished: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(outputs)
    command = ["+experiment=quickstart", *shrunk, "action=export", "export.repository=me/deeper", "dry_run=true"]
    for target in ("load", "sft"):
        assert main([*command, f"target={target}"]) == EXIT_DONE
        listed = set(re.findall(r" bytes  (\S+)", capsys.readouterr().out))
        assert listed >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
        assert ("expansion.json" in listed) == (target == "sft") and "manifest.json" not in listed


@SHARING
def test_chat_answers_questions_from_a_pipe(shrunk: list[str], finished: str, outputs: Path) -> None:
    """With the models of a finished run, and the same again from their directories."""
    command = ["+experiment=quickstart", *shrunk, "action=chat", "chat.max_new_tokens=4"]
    shown = []
    for compared in ("load,sft", "outputs/quickstart/load,outputs/quickstart/sft"):
        process = start(*command, f"compare={compared}", cwd=outputs, stdin=subprocess.PIPE)
        shown.append(process.communicate("What is an item?\n/reset\nWhy?\n/exit\n")[0])
        assert process.returncode == EXIT_DONE, shown
    assert "you> What is an item?" in shown[0] and "load> " in shown[0] and shown[0].count("sft> ") == 2
    assert shown[1] == shown[0]


@SHARING
def test_every_model_answers_the_same_questions_in_the_report(shrunk: list[str], finished: str, outputs: Path) -> None:
    """Only the answers and the report are built, and the scores are as before."""
    command = ["+experiment=quickstart", *shrunk, "evaluate.sample_answers=2"]
    status, output = run(*command, cwd=outputs)
    assert status == EXIT_DONE, output
    assert re.findall(r"build +(\S+)", output) == ["evaluate/answers", "report"]
    folder = outputs / "outputs" / "quickstart" / "evaluate" / "answers" / "answers"
    asked = {file.stem: [answer["question"] for answer in read_json(file)] for file in folder.glob("*.json")}
    assert set(asked) == {"load", "expand", "pretrain", "sft"} and len(set(map(tuple, asked.values()))) == 1
    report = (outputs / "outputs" / "quickstart" / "report" / "report.md").read_text()
    assert all(report.count(f"**{question}**") == 1 for question in asked["load"])


@SHARING
def test_a_run_without_conversations_ends_with_the_pre_trained_model(
    shrunk: list[str], finished: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its artifacts but the report are those of the run that tunes."""
    command = ["+experiment=quickstart", *shrunk, "data.instructions=null", "name=plain"]
    status, output = run(*command, cwd=outputs)
    assert status == EXIT_DONE, output
    assert re.findall(r"build +(\S+)", output) == ["report"]
    assert "without instruction tuning" in output and "tuned" not in output
    linked = {path.name for path in (outputs / "outputs" / "plain").iterdir()}
    assert linked == {"load", "expand", "tokenize", "pretrain", "evaluate", "report", "keys.json"}
    report = (outputs / "outputs" / "plain" / "report" / "report.md").read_text()
    assert "Pre-training on " in report and "tuned" not in report
    assert "sft" not in report.partition("## Reproduction")[0]
    monkeypatch.chdir(outputs)
    assert main([*command, "action=status"]) == EXIT_DONE
    assert "pretrain" in (shown := capsys.readouterr().out) and "sft" not in shown and "absent" not in shown
    assert main([*command, "action=export", "export.repository=me/deeper", "dry_run=true"]) == EXIT_DONE
    assert {"README.md", "model.safetensors", "expansion.json"} <= set(capsys.readouterr().out.split())


@SHARING
def test_a_sweep_shares_artifacts_and_has_one_report(shrunk: list[str], outputs: Path) -> None:
    command = ["--multirun", "+experiment=quickstart", "expand=copy,none", *shrunk, "name=sweep"]
    command += ["evaluate.targets=[load,sft]"]
    status, output = run(*command, cwd=outputs)
    assert status == EXIT_DONE, output
    base = outputs / "outputs" / "sweep"
    rows = json.loads((base / "report" / "results.json").read_text())
    assert {row["method"] for row in rows} == {"copy", "none"}
    assert (base / "expand-copy" / "load").resolve() == (base / "expand-none" / "load").resolve()


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not is_gone(pid)]


def _wait_for_metrics(stage: Path, seconds: float = 300.0) -> Path:
    """Waits until the artifact of a stage that is being built has a metrics file, and returns the file."""
    deadline = time.monotonic() + seconds
    # Not rglob, which fails if a directory below is removed meanwhile.
    while not (found := list(stage.glob("*.partial/metrics.jsonl"))):
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.05)
    return found[0]


def test_workers_exit_within_ten_seconds_after_the_driver_alone_is_killed(shrunk: list[str], tmp_path: Path) -> None:
    process = start("+experiment=quickstart", *shrunk, "pretrain.steps=100000", cwd=tmp_path)
    _wait_for_metrics(tmp_path / "outputs" / "artifacts" / "pretrain")
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10.0
    while _alive(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(workers) == []


def _last_step(metrics: Path) -> int:
    return max((json.loads(line)["step"] for line in metrics.read_text().split("\n")[:-1]), default=0)


def test_stopped_run_saves_its_state_and_resumes(shrunk: list[str], tmp_path: Path) -> None:
    """The first signal is sent to the driver, the second to a worker."""
    command = ["+experiment=quickstart", *shrunk, "stages=[pretrain]", "pretrain.steps=120"]
    command += ["pretrain.checkpoint_every_steps=1000"]  # so that only the signals cause checkpoints
    pretrain = tmp_path / "outputs" / "artifacts" / "pretrain"
    stopped_after = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(*command, cwd=tmp_path)
        metrics = _wait_for_metrics(pretrain)
        while _last_step(metrics) <= stopped_after:
            time.sleep(0.01)
        workers = [pid for pid in children(process.pid) if "pipeline.training.worker" in _command_of(pid)]
        os.kill(process.pid if number == signal.SIGTERM else workers[-1], number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == EXIT_STOPPED, output
        assert "the same command resumes" in output
        stopped_after = _last_step(metrics)
    status, output = run(*command, cwd=tmp_path)
    assert status == EXIT_DONE, output
    assert "resume" in output
    manifest = read_json(tmp_path / "outputs" / "quickstart" / "pretrain" / "manifest.json")
    assert manifest["attempts"] == 3 and manifest["seconds"] > manifest["metrics"]["seconds"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_signal_after_the_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(sys, "argv", ["pipeline", "--unknown"])
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("pipeline", run_name="__main__")
        for number in numbers:  # otherwise the interpreter would print a traceback while it exits
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert ended.value.code == EXIT_REQUEST


def test_killed_worker_ends_the_run_with_one_message(shrunk: list[str], tmp_path: Path) -> None:
    """The message names the rank, the signal and the log and shows its last lines. No process survives.

    Until then, the ranks accept connections from this machine only.
    """
    command = ["+experiment=quickstart", *shrunk, "stages=[pretrain]", "pretrain.steps=100000", "launch.processes=2"]
    process = start(*command, cwd=tmp_path)
    _wait_for_metrics(tmp_path / "outputs" / "artifacts" / "pretrain")
    processes = children(process.pid)
    addresses = listening_addresses([process.pid, *processes])
    assert addresses and all(address.is_loopback for address in addresses)
    os.kill(_find_rank(1, processes), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAILED, output
    message = output[output.index("rank 1 of 2: killed by SIGKILL") :]
    assert "  | " in message and "rank-1.log" in message
    assert "Traceback" not in output
    assert _alive(processes) == []
    assert "rank 1 of 2: killed by SIGKILL" in run(*command, "action=status", cwd=tmp_path)[1]


def _find_rank(rank: int, processes: list[int]) -> int:
    """Returns the process that is the worker of a rank."""
    found = [pid for pid in processes if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return found[0]


def test_two_simultaneous_runs_build_an_artifact_once(shrunk: list[str], tmp_path: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[expand]", "expand=copy"]
    processes = [start(*command, cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_DONE, EXIT_DONE], outputs
    for stage in ("load", "expand"):
        assert sorted(len(re.findall(rf"^ *done +{stage} ", output, re.MULTILINE)) for output in outputs) == [0, 1]
    assert any(re.search(r"waits +\w+ +process \d+ on .* is building it", output) for output in outputs), outputs
    assert not list(tmp_path.glob("outputs/artifacts/*/*.partial"))


def _command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


USE_MODELS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for stage in ("pretrain", "sft"):
    tokenizer, model = (kind.from_pretrained(stage) for kind in (AutoTokenizer, AutoModelForCausalLM))
    chat = [{"role": "user", "content": "What is item 3?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
assert not any(name == "pipeline" or name.startswith("pipeline.") for name in sys.modules)
"""


@SHARING
def test_trained_models_work_with_transformers_alone_from_any_directory(
    finished: str, outputs: Path, tmp_path: Path
) -> None:
    """The models are copied and loaded in a process that cannot import this package."""
    for stage in ("pretrain", "sft"):
        shutil.copytree((outputs / "outputs" / "quickstart" / stage).resolve(), tmp_path / stage)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-I", "-c", USE_MODELS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr


@SHARING
def test_snapshots_are_scored_and_reported(shrunk: list[str], outputs: Path) -> None:
    targets = "evaluate.targets=[load,expand,pretrain@33%,pretrain@67%,pretrain,sft]"
    status, output = run("+experiment=quickstart", *shrunk, "seed=5", "name=snapshots", targets, cwd=outputs)
    assert status == EXIT_DONE, output
    run_directory = outputs / "outputs" / "snapshots"
    rows = json.loads((run_directory / "report" / "results.json").read_text())
    scores = {row["target"]: row["value"] for row in rows if row["metric"] == "byte_perplexity"}
    assert list(scores) == ["load", "expand", "pretrain@33%", "pretrain@67%", "pretrain", "sft"]
    # The models differ, but expansion may preserve the scores of the base.
    assert len(set(scores.values())) >= 5
    assert {path.name for path in (run_directory / "evaluate").iterdir()} >= {"pretrain-at-33", "pretrain-at-67"}
    assert not list(run_directory.rglob("*%*"))
    assert "pre-trained, 33 %" in (run_directory / "report" / "report.md").read_text()
    status, output = run(
        "+experiment=quickstart", *shrunk, "seed=5", "name=snapshots", "evaluate.targets=[pretrain@50%]", cwd=outputs
    )
    assert status == EXIT_REQUEST
    assert "pretrain is finished and saved no snapshot there" in output and "force=[pretrain]" in output
