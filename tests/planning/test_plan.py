"""``action=plan`` prints correct numbers and all blockers of a run, and changes no file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs, main
from pipeline.driver.graph import lineage
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.models import hub
from pipeline.planning import prepare
from pipeline.planning.checks import find_blockers, refuse_blocked
from pipeline.training.job import snapshot_dir
from tests.fake_hub import COMMIT, REPO, serve
from tests.training.small import write_blocks

REPOSITORY = Path(__file__).resolve().parents[2]
Plan = Callable[..., str]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """``plan("quickstart", "seed=1")`` returns the output. The working directory must stay empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(experiment: str, *arguments: str) -> str:
        assert main([f"+experiment={experiment}", *arguments, "action=plan"]) == EXIT_DONE
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert list(Path.cwd().iterdir()) == []
        return captured.out

    return run


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make name resolution fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _blockers(output: str) -> dict[str, str]:
    """Return the blockers: setting -> the rest of its line."""
    lines = re.findall(r"^ +\d+\. ([\w.]+) = (.*)$", output, re.MULTILINE)
    return dict(lines)


def _states(output: str) -> dict[str, str]:
    """Return the table of stages: stage -> the rest of its line."""
    rows = re.findall(
        r"^ +((?:load|expand|tokenize|pretrain|sft|evaluate|report)\S*) +(\S.*?) *$", output, re.MULTILINE
    )
    return {name: rest for name, rest in rows if not rest.startswith("sft")}


def _hash_of(*folders: Path) -> str:
    """Hash the names, links and contents of all files in some directories."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if "__pycache__" in path.parts:  # written by the first process that imports a module
                continue
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            written = None if (path / "__pycache__").exists() else path.lstat().st_mtime_ns
            digest.update(f"{path} {written} ".encode() + content)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "experiment, layers, before, after",
    [
        ("lesa_llama3", "32 -> 48", "8.03B", "11.52B"),
        ("llama_pro_llama2", "32 -> 40", "6.74B", "8.36B"),
        ("opt_deus_llama32_1b", "16 -> 24", "1.24B", "1.72B"),
        ("opt_deus_llama31_8b", "32 -> 48", "8.03B", "11.52B"),
        ("solar_mistral", "32 -> 48", "7.24B", "10.73B"),
        ("quickstart", "30 -> 38", "134.5M", "162.8M"),
    ],
)
def test_published_sizes_are_reproduced(plan: Plan, experiment: str, layers: str, before: str, after: str) -> None:
    output = plan(experiment)
    assert f"layers {layers}" in output
    assert f"parameters {before} -> {after}" in output


def test_the_training_of_lesa_in_numbers(plan: Plan) -> None:
    """6 000 steps of 64 sequences of 2 048 tokens; 16 of 48 layers train."""
    output = plan("lesa_llama3", "launch.device=h100_80gb", "launch.processes=8")
    assert "3.49B of 11.52B, 30.3 %" in output
    assert re.search(r"steps +6,000", output) and re.search(r"tokens per step +131,072", output)
    assert re.search(r"tokens +786 M", output)
    assert re.search(r"checkpoint +39.0 GiB, written in 83.8 s", output)  # 12 bytes per parameter at 0.5 GB/s
    assert re.search(r"seconds to stop +170 ", output)  # two of them and a step
    assert "sizes from model.shape" in output


def test_hours_depend_on_devices_and_utilization(plan: Plan) -> None:
    command = ("lesa_llama3", "launch.device=h100_80gb", "launch.processes=8")
    assert re.search(r"hours +3.46 at 38%", plan(*command))
    assert re.search(r"hours +1.73 at 38%", plan(*command, "launch.nodes=2"))
    assert re.search(r"hours +6.59 at 20%", plan(*command, "launch.utilization=0.2"))


def test_hours_and_the_time_to_stop_depend_on_the_precision(plan: Plan) -> None:
    """An H100 has 989.4 TFLOP/s in bfloat16 and 66.9 in float32, without TF32."""
    command = ("lesa_llama3", "launch.device=h100_80gb", "launch.processes=8", "launch.utilization=0.4")
    rounded, exact = (plan(*command, f"pretrain.precision={name}") for name in ("bfloat16", "float32"))
    assert "at 40% of 989 TFLOP/s each" in rounded and "at 40% of 67 TFLOP/s each" in exact

    def number(row: str, output: str) -> float:
        found = re.search(rf"{row} +([\d.]+)", output)
        assert found is not None
        return float(found[1])

    assert number("hours", exact) / number("hours", rounded) == pytest.approx(989.4 / 66.9, rel=0.01)
    saving = 2 * number("written in", rounded)  # twice a checkpoint; the rest is a step
    steps = [number("seconds to stop", output) - saving for output in (exact, rounded)]
    assert steps[0] == pytest.approx(number("hours", exact) * 3600 / 6000, abs=1.0) and steps[0] > 4 * steps[1]


def test_the_config_of_a_model_directory_is_used_and_named(plan: Plan, shrunk: list[str], tiny_llama_dir: Path) -> None:
    output = plan("quickstart", *shrunk)
    assert f"sizes from the config in {tiny_llama_dir}" in output
    assert "layers 4 -> 6" in output
    assert _blockers(output) == {}


# ------------------------------------------------------------------------------- nothing is changed


def test_a_plan_reads_no_weights_writes_nothing_and_needs_no_torch(
    shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """All directories that it could write to are compared, and all files that it opens are observed. Of a weight file,
    only the header is read: its length in 8 bytes, and that many bytes of JSON."""
    home, model = tmp_path / "home", tmp_path / "model"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    shutil.copytree(tiny_llama_dir, model)
    probe = (
        "import builtins, io, sys; opened, readers = [], []\n"
        "sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == 'open' else None)\n"
        "class Counting(io.FileIO):\n"
        "    count = 0\n"
        "    def read(self, size=-1):\n"
        "        data = super().read(size); self.count += len(data); return data\n"
        "def watched(file, *arguments, **options):\n"
        "    if not str(file).endswith('.safetensors'): return io.open(file, *arguments, **options)\n"
        "    readers.append(Counting(file)); return readers[-1]\n"
        "builtins.open = watched\n"
        "from pipeline.__main__ import main; status = main(sys.argv[1:])\n"
        "weights = [path for path in opened if path.endswith('.safetensors')]\n"
        "unwatched = len(weights) - len(readers)\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'wandb', 'safetensors'} & set(sys.modules))\n"
        "print('status', status, 'imported', heavy, 'unwatched', unwatched,"
        " any('config.json' in path for path in opened), 'read', max(reader.count for reader in readers))"
    )
    environment = {**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    before = _hash_of(tmp_path, REPOSITORY / "pipeline", REPOSITORY / "conf")
    answer = subprocess.run(
        [sys.executable, "-c", probe, "+experiment=quickstart", *shrunk, f"model.path={model}", "action=plan"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    header = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    expected = f"status 0 imported [] unwatched 0 True read {header}"
    assert expected in answer.stdout, answer.stdout + answer.stderr
    assert _hash_of(tmp_path, REPOSITORY / "pipeline", REPOSITORY / "conf") == before


def _create_artifacts(command: list[str], *names: str) -> None:
    """Create artifacts of some nodes that contain only what a plan reads."""
    nodes = prepare([compose_jobs(command, False, None)[0].settings])[0].nodes
    for name in names:
        artifact = nodes[name].artifact
        artifact.partial.mkdir(parents=True)
        if name.startswith("tokenize/"):
            write_blocks(artifact.partial, blocks=40, length=64)
        artifact.commit({"key": artifact.key})


def test_existing_artifacts_are_cached_and_their_token_blocks_are_counted(
    shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = f"output_dir={tmp_path / 'out'}"
    command = ["+experiment=quickstart", *shrunk, "sft.steps=null", "sft.epochs=2.0", output_dir]
    there = {"load", "expand", "tokenize/corpus", "tokenize/instructions"}
    _create_artifacts(command, *there)
    before = _hash_of(tmp_path)
    assert main([*command, "action=plan"]) == EXIT_DONE
    output = capsys.readouterr().out
    assert {name for name, state in _states(output).items() if state == "cached"} == there
    assert _states(output)["pretrain"] == "to do"
    assert re.search(r"steps +3 +26 *$", output, re.MULTILINE)  # 2 epochs of 40 blocks, 3 per step and 1 of the corpus
    assert _hash_of(tmp_path) == before
    assert main([*command, "force=[load]", "action=plan"]) == EXIT_DONE
    assert set(_states(capsys.readouterr().out).values()) == {"to do"}


# ---------------------------------------------------------------------------------------- blockers


def test_a_finished_stage_that_lacks_what_is_asked_for_is_not_silently_kept(shrunk: list[str], tmp_path: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "expand=llama_pro", f"output_dir={tmp_path / 'out'}"]
    (prepared,) = prepare([compose_jobs(command, False, None)[0].settings])
    _create_artifacts(command, *prepared.selected)

    def refusal(*further: str) -> str | None:
        (prepared,) = prepare([compose_jobs([*command, *further], False, None)[0].settings])
        found = [blocker.fault for blocker in find_blockers(prepared)]
        return next((str(fault) for fault in found if "is finished" in fault.rule), None)

    for file, content in (("load", "{}"), ("expand", '{"scores_of": "load"}')):
        (prepared.nodes[f"evaluate/{file}"].artifact.path / "evaluation.json").write_text(content)
    assert refusal() is None
    refused = refusal("evaluate.rescore=true")
    assert refused is not None and "evaluate/expand is finished with the scores of load" in refused
    assert "force=[evaluate]" in refused and refusal("evaluate.rescore=true", "force=[evaluate]") is None

    refused = refusal("pretrain.snapshot_at=[0.25,0.5]")
    assert refused is not None and refused.startswith("pretrain.snapshot_at = 0.25: pretrain is finished and saved no")
    assert "force=[pretrain]" in refused and refusal("pretrain.snapshot_at=[0.25]", "force=[pretrain]") is None
    assert refusal("pretrain.snapshot_at=[0.25]", "stages=[expand]") is None
    snapshot_dir(prepared.nodes["pretrain"].artifact.path, 0.25).mkdir(parents=True)
    assert refusal("pretrain.snapshot_at=[0.25]") is None
    assert "sft.snapshot_at = 0.5" in (refusal("sft.snapshot_at=[0.5]") or "")


def test_all_blockers_are_listed_not_only_the_first(
    plan: Plan, no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    blockers = _blockers(
        plan(
            "lesa_llama3",
            "tracking=online",
            "launch.device=rtx4090_24gb",
            "launch.processes=4",
            "data.corpus.kind=files",
            "data.corpus.path=/no/such/corpus",
            "data.corpus.split=null",
            "data.corpus.config_name=null",
            "pretrain.sequence_length=16384",
            "pretrain.micro_batch=3",
        )
    )
    assert set(blockers) == {
        "model.path", "data.corpus.path", "data.instructions.path", "tracking.wandb", "output_dir", "launch.device",
        "pretrain.sequence_length", "pretrain.global_batch", "pretrain.micro_batch", "sft.micro_batch",
        "evaluate.tasks",
    }  # fmt: skip


@pytest.mark.parametrize("position", ["top", "least_important"])
def test_a_batch_job_is_checked_with_only_the_nodes_that_it_needs(
    shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["+experiment=quickstart", *shrunk, f"expand.position={position}"]
    (prepared,) = prepare([compose_jobs(command, False, None)[0].settings])
    for node in prepared.nodes.values():
        needed = lineage([node])
        needs = {name: each for name, each in prepared.nodes.items() if each.artifact.key in needed}
        refuse_blocked(replace(prepared, nodes=needs))


def test_a_signal_that_comes_too_late_is_shown_and_refused_for_batch_jobs(plan: Plan) -> None:
    everything = ("pretrain.trainable=all", "launch.nodes=1")
    output = plan("lesa_llama3", *everything)
    assert re.search(r"seconds to stop +553, more than slurm.signal_seconds=300 +168", output)
    assert "slurm.signal_seconds" not in _blockers(output)  # it may be the plan of a run without Slurm

    def fault(*more: str) -> UserError | None:
        command = ["+experiment=lesa_llama3", *everything, "action=submit", "dry_run=true", *more]
        (prepared,) = prepare([compose_jobs(command, False, None)[0].settings])
        found = [blocker.fault for blocker in find_blockers(prepared)]
        return next((each for each in found if each.setting == "slurm.signal_seconds"), None)

    refused = fault()
    assert refused is not None and refused.rule.startswith("pretrain takes about 553 seconds")
    assert refused.remedy == "Set slurm.signal_seconds=660."
    assert fault("slurm.signal_seconds=660") is None
    assert fault("slurm.pretrain.nodes=2") is None  # each writes half
    short = fault("slurm.tokenize.time=00:12:00", "slurm.report.time=11", "slurm.load.time=00:12:01")
    assert short is not None and short.remedy == (
        "Set slurm.signal_seconds=660, and slurm.tokenize.time, slurm.report.time to more than 12 minutes."
    )


def test_overrides_that_estimates_cannot_read_are_one_blocker(plan: Plan, shrunk: list[str]) -> None:
    wrong = "pretrain.deepspeed.overrides={zero_optimization: 3}"
    for device in ("cpu", "h100_80gb"):
        output = plan("quickstart", *shrunk, wrong, f"launch.device={device}")
        assert set(_blockers(output)) - {"launch.device"} == {"pretrain.deepspeed.overrides"}
        assert "a section with keys of" in _blockers(output)["pretrain.deepspeed.overrides"]


def test_stages_show_what_blocks_them(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    command = ("lesa_llama3", "launch.device=cpu", "data=python_docs", "evaluate=bundled")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**13))
    output = plan(*command)
    assert set(_blockers(output)) == {"model.path"}
    states = _states(output)
    assert re.fullmatch(r"blocked +1", states["load"]) and re.fullmatch(r"blocked +load", states["expand"])
    assert "expand" in states["pretrain"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert all(state.startswith("blocked") for state in _states(plan(*command)).values())


def test_data_that_no_chosen_stage_reads_block_nothing(
    plan: Plan, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**13))
    assert set(_blockers(plan("lesa_llama3", "stages=[expand]"))) == {"model.path"}
    assert "data.corpus.path" in _blockers(plan("lesa_llama3", "stages=[tokenize]"))


def test_the_quickstart_can_do_without_instruction_tuning(plan: Plan) -> None:
    output = plan("quickstart", "data.instructions=null")
    assert output.startswith("quickstart  llama_pro, seed 0, without instruction tuning (data.instructions=null)")
    assert set(_states(output)) == {
        "load", "expand", "tokenize/corpus", "pretrain", "evaluate/load", "evaluate/expand", "evaluate/pretrain",
        "report",
    }  # fmt: skip
    assert "no blockers found" in output


def test_force_does_not_name_a_stage_that_is_not_built(plan: Plan, shrunk: list[str]) -> None:
    output = plan("quickstart", *shrunk, "stages=[pretrain]", "force=[expand,sft]")
    assert _blockers(output)["force"].startswith("sft: ") and "add it to stages=[pretrain]" in output
    assert _blockers(plan("quickstart", *shrunk, "stages=[pretrain]", "force=[expand]")) == {}


def test_a_missing_chat_template_blocks_tuning(
    plan: Plan, shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    output = plan("quickstart", *shrunk, f"model.path={tmp_path / 'model'}", "data.chat_template=model")
    assert set(_blockers(output)) == {"data.chat_template"}
    assert _states(output)["tokenize/corpus"] == "to do"
    arguments = [f"model.path={tmp_path / 'model'}", "data.chat_template=model", "data.instructions=null"]
    assert _blockers(plan("quickstart", *shrunk, *arguments)) == {}


def test_a_gated_model_on_the_hub_is_a_blocker(
    plan: Plan, shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_llama_dir, tmp_path / "cache", monkeypatch) as hub:
        hub.refusal = "GatedRepo"
        output = plan("quickstart", *shrunk, f"model.path={REPO}")
    assert set(_blockers(output)) == {"model.path"} and "hf auth login" in output
    assert "sizes from nowhere" in output
    everything = plan("quickstart", "model=hub", "model.path=/no/such/model", "launch.device=h100_80gb")
    assert set(_blockers(everything)) == {"model.path", "launch.device"}


def test_a_model_on_the_hub_is_read_without_filling_its_cache(
    plan: Plan, shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_llama_dir, tmp_path / "cache", monkeypatch) as hub:
        output = plan("quickstart", *shrunk, f"model.path={REPO}")
    assert f"sizes from the config in {REPO} on the Hub" in output and "layers 4 -> 6" in output
    assert not (tmp_path / "cache").exists()
    assert not [path for path in hub.requests if path.endswith(".safetensors")]


def test_the_config_in_the_cache_is_used_if_the_hub_does_not_answer(
    plan: Plan, shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    with serve(tiny_llama_dir, tmp_path / "cache", monkeypatch) as hub:
        hf_hub_download(REPO, "config.json", revision=COMMIT)
        hub.refusal = "RepoNotFound"
        output = plan("quickstart", *shrunk, f"model.path={REPO}", f"model.revision={COMMIT}")
    assert "sizes from the config in the Hub's cache" in output and "layers 4 -> 6" in output


def test_settings_that_would_fit_the_memory_are_named(plan: Plan) -> None:
    output = plan("lesa_llama3", "launch.device=a100_40gb", "launch.processes=8")
    assert "pretrain.micro_batch" not in _blockers(output)
    too_large = plan("lesa_llama3", "launch.device=a100_40gb", "launch.processes=8", "pretrain.micro_batch=8",
                     "pretrain.activation_checkpointing=false")  # fmt: skip
    assert "Set pretrain.micro_batch=" in too_large
    smaller = plan("lesa_llama3", "launch.device=rtx4090_24gb", "launch.processes=8")
    assert "pretrain.deepspeed.zero_stage=3" in smaller


def test_the_memory_and_the_scratch_space_of_an_expansion_are_counted(plan: Plan) -> None:
    gpu = ("launch.device=rtx4090_24gb", "launch.processes=8")
    output = plan("lesa_llama3", *gpu)
    assert "expanding takes 9.0 GiB of 22.1 GiB of GPU memory" in output and "scratch space" not in output
    output = plan("lesa_llama3", *gpu, "expand.device=cpu")
    assert "expanding takes" not in output and "scratch space while expanding 7.0 GiB" in output
    output = plan("lesa_llama3", *gpu, "model.shape.hidden_size=8192", "model.shape.intermediate_size=28672")
    assert "needs about 24.5 GiB of GPU memory" in _blockers(output)["expand.device"]  # 32 * 28672 ** 2 bytes
    assert "scratch space while expanding 28.0 GiB" in output


def test_a_family_that_cannot_be_expanded_is_a_blocker(plan: Plan, shrunk: list[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unknown", "num_hidden_layers": 2}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes(b"")
    output = plan("quickstart", *shrunk, f"model.path={tmp_path / 'model'}")
    assert set(_blockers(output)) == {"model.path"} and "unknown" in output


def test_a_model_of_another_shape_is_a_blocker(plan: Plan, shrunk: list[str]) -> None:
    output = plan("quickstart", *shrunk, "+model.shape={hidden_size: 64}")
    assert "hidden_size 64" in _blockers(output)["model.shape"] and "hidden_size 32" in output


@pytest.mark.parametrize(
    "wrong", ["pretrain.micro_batch=0", "launch.device=h1000", "no.such=1", "expand.position=[1,2,3]"]
)
def test_invalid_settings_are_refused(shrunk: list[str], wrong: str) -> None:
    assert main(["+experiment=quickstart", *shrunk, wrong, "action=plan"]) == EXIT_REQUEST


# --------------------------------------------------------------------------------------- sweeps, speed


def test_a_sweep_marks_the_artifacts_that_its_jobs_share(plan: Plan, shrunk: list[str]) -> None:
    output = plan("quickstart", "--multirun", *shrunk, "expand=copy,none")
    first, second = output.split("quickstart/expand-none")[0], output.split("quickstart/expand-none")[1]
    assert "with" not in " ".join(_states(first).values())
    shared = {name for name, state in _states(second).items() if state == "with quickstart/expand-copy"}
    assert shared == {"load", "tokenize/corpus", "tokenize/instructions", "evaluate/load"}
    assert "and one report over all 2 jobs: outputs/quickstart/report" in output


def test_a_plan_takes_less_than_ten_seconds_if_no_name_server_answers(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(12))
    waiting = hub.TIMEOUT_SECONDS
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 2.5)  # four requests one after another would take ten seconds
    started, worked = time.monotonic(), time.process_time()
    output = plan("lesa_llama3")
    assert time.monotonic() - started < 10
    assert waiting + time.process_time() - worked < 10
    assert {"model.path", "data.corpus.path", "data.instructions.path", "evaluate.tasks"} <= set(_blockers(output))


def test_more_ranks_per_sequence_than_ranks_are_one_blocker(plan: Plan) -> None:
    printed = plan("quickstart", "launch.device=h100_80gb", "launch.processes=1", "pretrain.sequence_parallel=8")
    assert "pretrain.sequence_parallel = 8: it must divide the number of processes, which is 1" in printed
