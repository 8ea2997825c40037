"""Wrong requests end with exit code 2 and one message before anything starts, and a plan lists the same message."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import compose_jobs, main
from pipeline.command import Job
from pipeline.config import execution
from pipeline.driver import run
from pipeline.errors import EXIT_DONE, EXIT_REQUEST
from pipeline.expansion.methods import opt_deus
from pipeline.launch.machine import Machine
from pipeline.launch.slurm import current_allocation
from pipeline.models.weight_files import INDEX
from pipeline.planning import prepared
from tests.tiny_families import save_tiny

Arguments = list[str]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message of a refused command, which built nothing and which ``action=plan`` also listed."""
    planned = _first_blocker(capsys, *arguments)
    assert main(["+experiment=quickstart", *arguments]) == EXIT_REQUEST
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "build" not in captured.out
    assert captured.err.startswith(planned)
    return captured.err


def _first_blocker(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the first blocker of the plan in the form of a refusal: setting and value, and the rule."""
    status = main(["+experiment=quickstart", *arguments, "action=plan"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if status == EXIT_REQUEST:  # the settings contradict each other or the model: there is nothing to plan
        return captured.err
    blocker = re.search(r"^  1\. (\S+ = .*?): (.*)$", captured.out, re.MULTILINE)
    assert blocker is not None, captured.out
    return f"{blocker[1]}\n  {blocker[2]}\n"


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose the settings of a request once for its run and its plan, since that takes most of a test's time."""
    composed: dict[tuple[str, ...], list[Job]] = {}

    def compose(overrides: list[str], multirun: bool, config_dir: Path | None) -> list[Job]:
        action = "plan" if "action=plan" in overrides else "run"
        common = tuple(item for item in overrides if item != "action=plan")
        if common not in composed:
            composed[common] = compose_jobs(list(common), multirun, config_dir)
        return [replace(job, settings=job.settings.model_copy(update={"action": action})) for job in composed[common]]

    monkeypatch.setattr("pipeline.__main__.compose_jobs", compose)


@pytest.fixture
def base(shrunk: list[str], tmp_path: Path) -> Arguments:
    """A request that works."""
    return [*shrunk, f"output_dir={tmp_path / 'out'}"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make name resolution fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_model_path_that_does_not_exist(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "model.path=/no/such/directory")
    assert "model.path = /no/such/directory" in message


@pytest.mark.parametrize(
    "version, rule", [(None, "vLLM is to generate answers, and is not installed"), ("0.33.0", "needs a GPU")]
)
def test_vllm_that_cannot_be_used(
    version: str | None, rule: str, base: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {**run.package_versions(), **({"vllm": version} if version else {})}
    monkeypatch.setattr("pipeline.planning.checks.package_versions", lambda: versions)
    message = _refused(capsys, *base, "evaluate.backend=vllm", "launch.device=cpu")
    assert "evaluate.backend = vllm" in message and rule in message and "pip install vllm" in message


def test_a_directory_that_is_not_a_model(base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, f"model.path={tmp_path}")
    assert "config.json" in message


def test_a_model_with_only_pickle_weights(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    message = _refused(capsys, *base, f"model.path={tmp_path / 'model'}")
    assert "safetensors" in message


@pytest.fixture
def sharded(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny model in several weight files, to be damaged."""
    from transformers import AutoModelForCausalLM

    place = tmp_path / "sharded"
    shutil.copytree(tiny_llama_dir, place, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(place, max_shard_size="40KB")
    return place


def _remove_shard(model: Path) -> str:
    (model / "model-00002-of-00005.safetensors").unlink()
    return "names model-00002-of-00005.safetensors, which does not exist"


def _truncate_shard(model: Path) -> str:
    shard = model / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    return "the file is truncated"


def _add_missing_tensor_to_index(model: Path) -> str:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00002-of-00005.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    return "maps model.layers.9.mlp.up_proj.weight to model-00002-of-00005.safetensors, which does not contain it"


def _break_index(model: Path) -> str:
    (model / INDEX).write_text("{")
    return "the index of the weights cannot be read"


def _mark_as_quantized(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    return "quantized"


def _change_config(model: Path, **entries: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **entries}))


def _change_family(model: Path) -> str:
    _change_config(model, model_type="bert")
    return "FAMILIES in pipeline/models/families/table.py"


def _untie_head(model: Path) -> str:
    _change_config(model, tie_word_embeddings=False)
    return "its weights and its config.json disagree: lm_head.weight is missing"


def _add_a_billion_layers(model: Path) -> str:
    _change_config(model, num_hidden_layers=10**9)
    return "num_hidden_layers = 1000000000, which must be an integer from 1 to 10000"


def _need_own_code(model: Path) -> str:
    _change_config(model, auto_map={"AutoModelForCausalLM": "own.Own"})
    return "its auto_map names classes that only its own code defines (own.Own)"


def _replace_tokenizer_by_a_pipe(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    return "tokenizer.json is not a regular file"


@pytest.mark.parametrize(
    "damage",
    [
        _remove_shard,
        _truncate_shard,
        _add_missing_tensor_to_index,
        _break_index,
        _mark_as_quantized,
        _change_family,
        _untie_head,
        _add_a_billion_layers,
        _need_own_code,
        _replace_tokenizer_by_a_pipe,
    ],
)
def test_a_model_that_is_incomplete_or_not_supported(
    damage: Callable[[Path], str], base: Arguments, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = damage(sharded)
    message = _refused(capsys, *base, f"model.path={sharded}")
    assert "model.path = " in message and rule in message
    assert message.count("model.path = ") == 1


def test_weights_that_are_not_finite_leave_no_artifact(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["+experiment=quickstart", *base, f"model.path={model}", "stages=[load]"]) == EXIT_REQUEST
    message = capsys.readouterr().err
    assert "model.norm.weight contains NaN or infinity" in message and "Traceback" not in message
    assert not [*tmp_path.glob("out/**/manifest.json"), *tmp_path.glob("out/**/*.safetensors")]


def test_a_place_that_is_taken(base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "out" / "artifacts" / "load" / "0123"
    (tmp_path / "out" / "quickstart" / "load").mkdir(parents=True)
    artifact.mkdir(parents=True)
    (tmp_path / "out" / "linked").symlink_to(artifact)
    (artifact / "manifest.json").write_text("{}")
    (tmp_path / "out" / "file").touch()
    for argument, place in {
        "name=quickstart": "quickstart/load",
        "name=linked/x": "linked",
        "name=file": "file",
    }.items():
        message = _refused(capsys, *base, argument)
        assert message.startswith("name = ") and f"{tmp_path / 'out' / place} is something else" in message
    assert "is a finished artifact" in _refused(capsys, *base, f"output_dir={artifact / 'more'}")


def test_a_hub_id_without_a_network(base: Arguments, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    message = _refused(capsys, *base, "model.path=some-organization/some-model")
    assert "model.path = some-organization/some-model" in message
    assert time.monotonic() - started < 10.0


def test_a_missing_model_package_names_the_pip_command(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    package = ["model.path=package:no_such_package", 'model.package="no-such-package==1.0"']
    message = _refused(capsys, *base, *package)
    assert "pip install --no-deps no-such-package==1.0" in message


@pytest.mark.parametrize("content", [b"", b"\n\n"], ids=["no bytes", "blank lines"])
def test_an_empty_corpus(content: bytes, base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    message = _refused(capsys, *base, f"data.corpus.path={tmp_path / 'empty.txt'}")
    assert "data.corpus.path" in message and "empty" in message


def test_a_corpus_file_that_is_not_text(base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 8)
    message = _refused(capsys, *base, f"data.corpus.path={tmp_path / 'picture.txt'}")
    assert "data.corpus.path" in message and "text" in message


def test_a_missing_corpus(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.corpus.path" in _refused(capsys, *base, "data.corpus.path=/no/such/file.txt")


@pytest.mark.parametrize("weight", ["0", "-0.5", "much"])
def test_an_invalid_weight_of_a_data_source(weight: str, base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, f"data.corpus.weight={weight}")
    assert message.startswith("data.corpus.weight = ")


@pytest.fixture
def mixed(base: Arguments, tiny_corpus: Path, tiny_chats: Path) -> Arguments:
    """A request with two data sources that works once both have a path."""
    kept = [item for item in base if not item.startswith("data")]
    second = ["kind=files", "config_name=null", "split=null", f"path={tiny_corpus}"]
    second = [f"data.corpus.1.{setting}" for setting in second]
    return [*kept, "data=replay", f"data.instructions.path={tiny_chats}", *second]


def test_an_error_in_one_of_several_data_sources_names_it(
    mixed: Arguments, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data.corpus.0.path=..." in _refused(capsys, *mixed)
    assert "data.corpus.0.path = /no/such" in _refused(capsys, *mixed, "data.corpus.0.path=/no/such")
    both = [*mixed, f"data.corpus.0.path={tiny_corpus}"]
    assert _refused(capsys, *both, "data.corpus.1.weight=0").startswith("data.corpus.1.weight = 0")
    (tmp_path / "empty.txt").write_text("\n")
    message = _refused(capsys, *both, f"data.corpus.1.path={tmp_path / 'empty.txt'}")
    assert message.startswith("data.corpus.1.path") and "empty" in message
    assert "numbered from 0" in _refused(capsys, *both, f"data.corpus.path={tiny_corpus}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("expand=[1,2]", "expand = [1,2]\n  there is no such method; choose from"),
        ("model=null", "model = null\n  there is no such model; choose from"),
        ("pretrain=3", "pretrain = 3\n  there is no such pretrain; choose from default"),
        ("pretrain.deepspeed=[1]", "pretrain.deepspeed = [1]\n  it is a section with the settings zero_stage, "),
        ("pretrain.deepspeed=2", "pretrain.deepspeed = 2\n  it is a section with the settings zero_stage, "),
        ("data.corpus=/texts", 'data.corpus = "/texts"\n  it is a section with the settings kind, path, '),
        ("data.corpus=[/a]", 'data.corpus.0 = "/a"\n  it is a section with the settings kind, path, '),
        ("evaluate.tasks=5", "evaluate.tasks = 5\n  it must be a list, such as [a,b]."),
        (
            "pretrain.role_learning_rates=2",
            "pretrain.role_learning_rates = 2\n  it must be a mapping, such as {a: b}.",
        ),
        ("evaluate=/tasks", "evaluate = /tasks\n  there is no such evaluate; choose from bundled"),
        *(
            (f"{group}={path}", f"{group} = {path}\n  it selects a file in conf, not a path.\n  Set {remedy}={path}")
            for group, path, remedy in [
                ("model", "/models/mine", "model=hub model.path"),
                ("model", "Qwen/Qwen3-8B", "model=hub model.path"),
                ("data", "texts/", "data=files data.corpus.path"),
            ]
        ),
        (
            "evaluate.num_fewshot=[1]",
            "evaluate.num_fewshot = [1]\n  it must be a valid integer, or it must be a mapping",
        ),
    ],
)
def test_a_value_in_place_of_a_section(
    base: Arguments, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _refused(capsys, *base, override).startswith(message)


def test_a_sequence_longer_than_the_context(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "pretrain.sequence_length=512")
    assert "pretrain.sequence_length = 512" in message and "256" in message
    assert _refused(capsys, *base, "pretrain.sequence_length=512", "stages=[tokenize]") == message


def test_a_batch_that_is_not_divisible_by_the_ranks(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "launch.processes=3")
    assert "global_batch = 4" in message and "3" in message


def test_more_new_layers_than_solar_can_make(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "expand=solar", "expand.new_layers=5")
    assert "expand.new_layers = 5" in message


@pytest.mark.parametrize("method", ["lesa", "opt_deus", "llama_pro", "average", "copy"])
def test_too_many_new_layers(method: str, base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, f"expand={method}", "expand.new_layers=17")
    assert "expand.new_layers = 17" in message and "16 or less" in message


def test_an_invalid_list_of_gaps(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expand.position" in _refused(capsys, *base, "expand.position=[1,2,3]")
    assert "expand.position" in _refused(capsys, *base, "expand.position=[1,9]")


def test_slices_that_leave_out_a_layer(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "expand=stack", "expand.slices=[0-1,1-2]")
    assert message.startswith("expand.slices = ") and "layer 3 does not occur" in message
    message = _refused(capsys, *base, "expand=stack", "expand.slices=[0-3,3-1]")
    assert message.startswith("expand.slices = ") and "3-1 is not a slice" in message


def test_an_output_scale_above_that_of_a_copy(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "expand=copy", "expand.output_scale=1.5")
    assert message.startswith("expand.output_scale = 1.5") and "less than or equal to 1" in message


def test_an_output_directory_that_cannot_be_written(
    base: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    message = _refused(capsys, *base, f"output_dir={tmp_path / 'file' / 'out'}")
    assert "output_dir" in message


def test_too_little_disk(base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    message = _refused(capsys, *base)
    assert "output_dir" in message and "GiB are needed" in message


def test_an_unknown_task(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "evaluate.tasks=[held_out_txt]")
    assert "held_out_text" in message


def test_an_invalid_target(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "evaluate.targets=[pretrain@100%]")
    assert "evaluate.targets" in message and "use expand for 0 % and pretrain for 100 %" in message


def test_tuning_a_model_without_a_chat_template(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    message = _refused(capsys, *base, f"model.path={tmp_path / 'model'}", "data.chat_template=model")
    assert "data.chat_template" in message and "plain" in message


def test_a_template_that_renders_no_conversation(
    base: Arguments, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    changed = [*base, f"model.path={model}", "data.chat_template=model"]
    (model / "chat_template.jinja").write_text("\n" + template.replace("message['content']", "'...'"))
    message = _refused(capsys, *changed)
    assert message.startswith("data.chat_template = model") and "leaves out the text" in message
    (model / "chat_template.jinja").write_text(template.replace("assistant\n", "assistant\n<think>\n"))
    message = _refused(capsys, *changed)
    assert "data.instructions.path" in message and "must begin with '<think>" in message


@pytest.mark.parametrize(
    "override", ["evaluate.targets=[load,sft]", "stages=[sft]", "evaluate.sample_answers=2", "sft.corpus_fraction=0.2"]
)
def test_tuning_without_conversations(base: Arguments, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "data.instructions=null", override)
    setting = override.partition("=")[0]
    assert message.startswith(f"{setting} = ") and "data.instructions=null" in message and message.count(" = ") == 1


@pytest.mark.parametrize("setting", ["data.corpus.path", "data.instructions.path", "model.path"])
def test_an_empty_path_is_not_the_current_directory(
    setting: str, base: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, *base, "data=files", "data.corpus.path=a", "data.instructions.path=b", f"{setting}=")
    assert message.startswith(setting) and "empty" in message


def test_online_tracking_without_a_login(
    base: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "wandb login" in _refused(capsys, *base, "tracking=online")
    monkeypatch.setenv("WANDB_MODE", "of")
    assert _refused(capsys, *base, "tracking=online").startswith("WANDB_MODE = of")


@pytest.mark.parametrize(
    "setting, arguments",
    [
        ("pretrain.compile", ["pretrain.compile=true", "pretrain.deepspeed.zero_stage=3"]),
        ("sft.float32_products", ["sft.float32_products=true", "sft.deepspeed.zero_stage=0"]),
        ("pretrain.trainable", ["pretrain.trainable=layers.(3"]),
        ("sft.trainable", ["sft.trainable=no_such_name"]),
        ("sft.trainable", ["sft.trainable=new_layers+embedings"]),
        ("pretrain.trainable", ["pretrain.trainable=all+/layers.(3/"]),
        ("sft.trainable", ["sft.trainable=new_layers", "expand=none"]),
        ("expand.new_layers", ["pretrain.trainable=matched", "expand=none", "expand.new_layers=5"]),
        ("expand.new_layers", ["pretrain.trainable=matched", "expand=none", "expand.new_layers=0"]),
        ("expand.position", ["sft.trainable=matched", "expand=none", "expand.position=overlap"]),
        ("pretrain.role_learning_rates", ["pretrain.role_learning_rates={o_proj: 2.0}"]),
        ("pretrain.role_learning_rates", ["pretrain.role_learning_rates={q_norm: 2.0}"]),
        (
            "pretrain.deepspeed.overrides",
            [
                "pretrain.role_learning_rates={o: 2.0}",
                "pretrain.deepspeed.overrides={zero_optimization: {offload_optimizer: {ratio: 0.5}}}",
            ],
        ),
        ("pretrain.optimizer", ["pretrain.optimizer=muon", "pretrain.deepspeed.zero_stage=3"]),
        ("sft.optimizer", ["sft.optimizer=muon", "sft.deepspeed.zero_stage=2", "sft.deepspeed.offload_optimizer=true"]),
        ("sft.optimizer", ["sft.optimizer=muon", "sft.trainable=norms"]),
        ("pretrain.newton_schulz_steps", ["pretrain.newton_schulz_steps=3"]),
        ("pretrain.base_learning_rate", ["pretrain.base_learning_rate=1e-4"]),
        ("pretrain.router_aux_loss", ["pretrain.router_aux_loss=0.01"]),  # of a dense model
        ("pretrain.corpus_fraction", ["pretrain.corpus_fraction=0.1"]),
        ("launch.device", ["launch.device=cuda"]),
        ("sft.deepspeed.overrides", ["sft.deepspeed.overrides={optimizer: {type: SGD}}"]),
    ],
)
def test_training_settings_that_cannot_work(
    setting: str, arguments: Arguments, base: Arguments, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(prepared, "detect_machine", lambda: Machine(cores=2, gpus=0))
    assert _refused(capsys, *base, *arguments).startswith(f"{setting} = ")


def test_a_solver_whose_package_is_not_installed(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opt_deus, "find_spec", lambda name: None)
    message = _refused(capsys, *base, "expand=opt_deus", "expand.variant=reference")
    assert message.startswith("expand.solver = pot_float32") and "pip install" in message


def test_a_missing_package_whose_version_is_recorded(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RECORDED_PACKAGES", ("torch", "no-such-package"))
    run.package_versions.cache_clear()
    assert _refused(capsys, *base).startswith("package = no-such-package")


def test_one_of_several_pods(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    assert "PET_NNODES = 2" in _refused(capsys, *base, "stages=[pretrain]")


def test_a_further_copy_under_torchrun_does_nothing(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["+experiment=quickstart", *base]) == EXIT_DONE
    assert "the process with local rank 0" in capsys.readouterr().err


def test_slurm_job_whose_other_nodes_cannot_be_reached(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a container without Slurm's programs."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    current_allocation.cache_clear()
    assert "SLURM_JOB_NODELIST = n[1-2]" in _refused(capsys, *base, "stages=[load]")


def test_training_that_does_not_fit_the_named_gpu(
    base: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepared, "detect_machine", lambda: Machine(cores=2, gpus=1))
    monkeypatch.setitem(execution.GPUS, "h100_80gb", execution.Gpu("H100", 2**-10, 989.4, 66.9))
    message = _refused(capsys, *base, "launch.device=h100_80gb")
    assert message.startswith("pretrain.micro_batch = 2") and "h100_80gb" in message


def test_a_method_whose_module_cannot_be_imported(
    base: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_method.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert _refused(capsys, *base, "expand.module=broken_method").startswith("expand.module = broken_method")


def test_a_mixture_with_some_dense_layers(
    base: Arguments, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model", tiny_tokenizer, mlp_only_layers=[1])
    between_unlike = ("expand=average", "expand.new_layers=1", "expand.position=[0]")
    message = _refused(capsys, *base, f"model.path={model}", *between_unlike)
    assert "layers 0 and 1" in message and "differ" in message


def test_shared_sequences_of_a_model_with_sliding_windows_on_cpus(
    base: Arguments, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only flex_attention computes windows without a mask, and it has no backward pass there."""
    model = save_tiny("mistral", tmp_path / "model", tiny_tokenizer)
    shared = ("launch.processes=2", "pretrain.sequence_parallel=2", "pretrain.global_batch=2")
    message = _refused(capsys, *base, f"model.path={model}", *shared)
    assert message.startswith("pretrain.sequence_parallel = 2") and "sliding window is 8 tokens" in message
    assert "Set pretrain.sequence_parallel=1." in message


def test_the_error_without_an_experiment_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_REQUEST
    assert "quickstart" in capsys.readouterr().err


def test_a_path_instead_of_a_dataset_on_the_hub(base: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *base, "data=wikipedia", "data.corpus.path=/texts/corpus.jsonl")
    assert "data.corpus.path = /texts/corpus.jsonl" in message and "kind: files" in message


def test_data_that_no_chosen_stage_reads_are_not_checked(
    base: Arguments, offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = ["data=wikipedia", "data.corpus.path=wikimedia/wikipedia", "data.instructions.path=vicgalle/alpaca-gpt4"]
    assert "data.corpus.path = wikimedia/wikipedia" in _refused(capsys, *base, *hub, "stages=[tokenize]")
    assert main(["+experiment=quickstart", *base, *hub, "stages=[expand]"]) == EXIT_DONE
    assert (tmp_path / "out" / "quickstart" / "expand" / "expansion.json").is_file()
