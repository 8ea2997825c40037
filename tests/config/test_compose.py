"""Composing experiments, and the error messages for wrong requests."""

from __future__ import annotations

import copy
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import CONF, compose_jobs, main
from pipeline.config import METHODS, Settings
from pipeline.config.messages import list_choices, validate_settings
from pipeline.config.secrets import contains_secret
from pipeline.errors import EXIT_REQUEST, UserError

EXPERIMENTS = list_choices("experiment", [CONF])


def _compose(*overrides: str, config_dir: Path | None = None) -> Settings:
    return compose_jobs(list(overrides), False, config_dir)[0].settings


def _refusal(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        _compose(*overrides)
    return caught.value


def test_the_published_experiments_exist() -> None:
    assert set(EXPERIMENTS) >= {
        "quickstart", "lesa_llama3", "llama_pro_llama2", "opt_deus_llama32_1b", "opt_deus_llama31_8b", "solar_mistral",
        "grow", "grow_llama31_8b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "method"),
    [("quickstart", method) for method in METHODS] + list(zip(EXPERIMENTS, cycle(METHODS), strict=False)),
)
def test_experiments_compose_with_other_methods(experiment: str, method: str) -> None:
    settings = _compose(f"+experiment={experiment}", f"expand={method}")
    assert settings.expand.method == method
    assert (settings.expand.new_layers == 0) == (method == "none")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_first_line_of_an_experiment_is_the_command_that_runs_it(experiment: str) -> None:
    first = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(f" +experiment={experiment}")
    assert _compose(f"+experiment={experiment}").name == experiment


def test_published_hyperparameters() -> None:
    pro = _compose("+experiment=llama_pro_llama2")
    assert (pro.pretrain.global_batch, pro.pretrain.sequence_length, pro.pretrain.steps) == (1024, 4096, 15900)
    assert (pro.pretrain.learning_rate, pro.pretrain.warmup_fraction, pro.pretrain.weight_decay) == (2e-4, 0.06, 0.1)
    assert (pro.sft.global_batch, pro.sft.learning_rate, pro.sft.trainable) == (128, 2e-5, "all")
    deus = _compose("+experiment=opt_deus_llama31_8b")
    assert (deus.pretrain.sequence_length, deus.pretrain.steps, deus.sft.epochs) == (2048, 12100, 1.0)


def test_a_dictionary_is_overridden_like_any_other_value() -> None:
    settings = _compose(
        "+experiment=quickstart", "pretrain.role_learning_rates={o: 2.0, down: 4.0}",
        "sft.deepspeed.overrides={zero_optimization: {overlap_comm: true}}",
    )  # fmt: skip
    assert settings.pretrain.role_learning_rates == {"o": 2.0, "down": 4.0}
    assert settings.sft.deepspeed.overrides == {"zero_optimization": {"overlap_comm": True}}
    wrong = _refusal("+experiment=quickstart", "pretrain.role_learning_rate={o: 2.0}")
    assert "role_learning_rates" in wrong.remedy


def test_variants_are_presets_of_settings() -> None:
    reference = _compose("+experiment=quickstart", "expand=lesa", "expand.variant=reference").expand
    paper = _compose("+experiment=quickstart", "expand=lesa", "expand.variant=paper").expand
    own = _compose("+experiment=quickstart", "expand=lesa", "expand.epochs=3").expand
    assert (reference.epochs, reference.norm_loss_weight) == (10, 5e-4)  # type: ignore[union-attr]
    assert (paper.epochs, paper.norm_loss_weight) == (5, 5e-5)  # type: ignore[union-attr]
    assert own.epochs == 3  # type: ignore[union-attr]


def test_all_jobs_of_a_sweep_are_composed_at_once() -> None:
    jobs = compose_jobs(["+experiment=quickstart", "expand=lesa,none", "seed=0,1"], True, None)
    assert [job.settings.name for job in jobs] == [
        f"quickstart/expand-{method}_seed-{seed}" for method in ("lesa", "none") for seed in (0, 1)
    ]
    with pytest.raises(UserError, match="there is no such method"):
        compose_jobs(["+experiment=quickstart", "expand=lesa,lasa"], True, None)


def test_a_config_dir_adds_experiments(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("defaults:\n  - override /expand: copy\nname: mine\n")
    settings = _compose("+experiment=mine", config_dir=tmp_path)
    assert (settings.name, settings.expand.method) == ("mine", "copy")


@pytest.mark.parametrize("written", ["24:00:00", "'24:00:00'", "1-00:00:00", "1440"])
def test_a_time_limit_in_a_file_needs_no_quotes(written: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text(f"defaults: [gpu]\nsft: {{time: {written}}}\n")
    settings = _compose("+experiment=quickstart", "slurm=mine", config_dir=tmp_path)
    assert settings.slurm.sft.time_seconds == 24 * 3600


def _source(path: str) -> str:
    return (
        f"{{kind: files, path: {path}, config_name: null, split: null, revision: null, text_field: null, weight: 1.0}}"
    )


TWO_SOURCES = f"[{_source('/a')}, {_source('/b')}]"


@pytest.mark.parametrize("group", ["files", "replay"])  # one corpus, and a list of two
@pytest.mark.parametrize("setting", ["corpus", "instructions", "forgetting"])
def test_a_list_of_sources_on_the_command_line_replaces_those_of_a_file(group: str, setting: str) -> None:
    files = [f"data={group}", "data.instructions.path=/c"]
    files += ["data.corpus.path=/d"] if group == "files" else ["data.corpus.0.path=/d"]
    settings = _compose("+experiment=quickstart", *files, f"data.{setting}={TWO_SOURCES}", f"data.{setting}.1.path=/e")
    assert [source.path for source in getattr(settings.data, setting)] == ["/a", "/e"]


def test_a_list_of_sources_in_a_file_belongs_to_the_group_data(tmp_path: Path) -> None:
    for folder in ("experiment", "data"):
        (tmp_path / folder).mkdir()
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.write_text(f"defaults: [override /data: files]\nname: mine\ndata:\n  corpus: {TWO_SOURCES}\n")
    with pytest.raises(UserError, match=r"\+experiment = mine: .* list .*DIR/data/NAME\.yaml.*override /data: NAME"):
        _compose("+experiment=mine", config_dir=tmp_path)
    others = (CONF / "data" / "replay.yaml").read_text().partition("instructions:")[2]
    (tmp_path / "data" / "own.yaml").write_text(f"corpus: {TWO_SOURCES}\ninstructions:{others}")
    experiment.write_text("defaults: [override /data: own]\nname: mine\ndata:\n  instructions: null\n")
    assert [source.path for source in _compose("+experiment=mine", config_dir=tmp_path).data.corpus] == ["/a", "/b"]


def test_a_misspelled_key_in_an_experiment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("name: mine\npretrain:\n  learning_rte: 1.0e-4\n")
    with pytest.raises(UserError) as caught:
        _compose("+experiment=mine", config_dir=tmp_path)
    assert caught.value.setting == "pretrain.learning_rte"
    assert "pretrain.learning_rate" in caught.value.remedy


WRONG = [
    (["+experiment=quickstrt"], "+experiment", "quickstrt", "quickstart?"),
    (["+experiment=quickstart", "expand=lasa"], "expand", "lasa", "Did you mean lesa?"),
    (["+experiment=quickstart", "expand.new_layer=3"], "expand.new_layer", "", "expand.new_layers?"),
    (["+experiment=quickstart", "+pretrain.lerning_rate=3"], "pretrain.lerning_rate", "3", "pretrain.learning_rate?"),
    (["+experiment=quickstart", "pretrain.steps=abc"], "pretrain.steps", '"abc"', "pretrain.steps="),
    (["+experiment=quickstart", "pretrain.steps=1.5"], "pretrain.steps", "1.5", "pretrain.steps="),
    (["+experiment=quickstart", "expand.new_layers=0"], "expand.new_layers", "0", "expand.new_layers="),
    (["+experiment=quickstart", "expand.position=side"], "expand.position", '"side"', "expand.position="),
    (["+experiment=quickstart", "expand.method=lesa"], "expand.method", "lesa", "Set expand=lesa"),
    (["+experiment=quickstart", "model.path=/a=b/c~d"], "model.path", "/a=b/c~d", """'model.path="/a=b/c~d"'"""),
    (["+experiment=quickstart", "model=hub"], "model.path", "(not given)", "model.path="),
    (["+experiment=quickstart", "expand=lesa,copy"], "expand", "lesa,copy", "--multirun"),
    (["+experiment=quickstart", "expand=lesa", "expand.variant=x"], "expand.variant", "x", "reference or paper"),
    (["+experiment=quickstart", "expand.variant=paper"], "expand.variant", "", "as with expand=lesa"),
    (["+experiment=quickstart", "+expand.slices=[0-29,0-29]"], "expand.slices", "0-29", "as with expand=stack"),
    (["+experiment=quickstart", "pretrain.epochs=1"], "pretrain", "{...}", "steps=null there to train for epochs"),
    (["+experiment=quickstart", "action=go"], "action", '"go"', "action="),
    (["+experiment=quickstart", "dry_run=true"], "dry_run", "true", "action=plan"),
    (["+experiment=quickstart", "action=clean", "confirm=true", "dry_run=true"], "dry_run", "true", "confirm=true"),
    (["+experiment=quickstart", "hydra/job_logging='${'"], "command line", "${", "conf/config.yaml"),
    (["+experiment=quickstart", "+=[]"], "command line", "+=[]", "conf/config.yaml"),
    (["+experiment=quickstart", "modle=hub"], "modle", "", "model?"),
]


@pytest.mark.parametrize(("command", "setting", "value", "remedy"), WRONG, ids=lambda item: str(item)[:40])
def test_the_error_for_a_wrong_request_names_setting_value_rule_and_remedy(
    command: list[str], setting: str, value: str, remedy: str
) -> None:
    error = _refusal(*command)
    assert error.setting == setting
    assert value in str(error.value)
    assert error.rule
    assert remedy in error.remedy


def test_the_error_without_an_experiment_lists_them() -> None:
    assert all(name in _refusal().rule for name in EXPERIMENTS)


def test_one_message_lists_all_errors() -> None:
    error = _refusal("+experiment=quickstart", "pretrain.steps=abc", "sft.beta1=2")
    assert "sft.beta1" in error.setting + error.rule and "pretrain.steps" in error.setting + error.rule


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY"])
def test_a_token_in_a_setting_is_refused_but_not_printed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "topsecret-0123456789")
    error = _refusal("+experiment=quickstart", "model.path=dir/topsecret-0123456789")
    assert error.setting == "model.path" and "topsecret" not in str(error)


@pytest.mark.parametrize(
    "override",
    [
        'slurm.environment=["export MY_TOKEN=topsecret"]',
        "slurm.options=['--export=ALL,DB_PASSWORD=topsecret']",
        '+expand.api_key="topsecret"',
        "sft.deepspeed.overrides={comet: {api_key: topsecret}}",
        'slurm.environment=["export https_proxy=http://me:topsecret@proxy:80"]',
        "data.corpus.path=[topsecret=x,ghp_topsecrettopsecrettopsecrettopsecret",  # Hydra cannot parse it
        "model.path=sk-ant-topsecret-topsecret,other",  # a sweep without --multirun
        "sk-topsecret-topsecret-topsecret=1",
    ],
)
def test_a_secret_is_refused_by_its_name_or_format_but_not_printed(override: str) -> None:
    error = _refusal("+experiment=quickstart", override)
    assert error.value == "(hidden)" and "environment" in error.remedy
    assert "topsecret" not in str(error)


def test_a_secret_in_a_configuration_file_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "mine.yaml").write_text("defaults: [gpu]\nenvironment: ['export MY_TOKEN=topsecret']\n")
    with pytest.raises(UserError, match="slurm.environment = \\(hidden\\)") as error:
        compose_jobs(["+experiment=quickstart", "slurm=mine"], False, tmp_path)
    assert "topsecret" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "export TOKENIZERS_PARALLELISM=false", "export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$MINE"',
        "--export=HF_TOKEN", "MAX_TOKENS=x", "SSH_KEY_FILE=me.pem", "NCCL_IB_PKEY=0", "git@host:me/repository",
        "{num_key_value_heads: 8}", "image:24.01@sha256:0123", "--gres=gpu:h100:8", "http://proxy:8080/me@x",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_accepted(text: str) -> None:
    assert not contains_secret(text)


@pytest.fixture(scope="module")
def composed() -> Any:
    """The settings of a run as a dictionary."""
    files = ["data=files", "data.corpus.path=x", "data.instructions.path=x"]
    values = _compose("+experiment=quickstart", *files).model_dump(mode="json")
    (values["data"]["corpus"],) = values["data"]["corpus"]
    return values


@pytest.mark.parametrize(
    "setting, value",
    [
        ("name", "../elsewhere"), ("name", "/absolute"), ("name", "a//b"), ("name", "a/./b"), ("name", "artifacts"),
        ("name", "artifacts/load/0123"), ("name", "quickstart/expand"), ("name", "quickstart/slurm"),
        ("name", '"a\\nb"'), ("name", '" a"'), ("name", "x" * 256), ("output_dir", '""'), ("output_dir", '"a\\nb"'),
        ("output_dir", "/tmp/" + "x" * 300), ("output_dir", "x/" * 3000), ("model.path", "x" * 300),
        ("data.corpus.path", "/tmp/" + "x" * 300), ("evaluate.include_path", "[a," + "x" * 300 + "]"),
        ("slurm.partition", '"gpu\\ntouch x"'), ("slurm.account", '"a\\rb"'), ("slurm.pretrain.memory", '"8G\\nx"'),
        ("slurm.environment", '["module load cuda\\nrm x"]'), ("slurm.options", '["--mail-type=FAIL\\ntouch x"]'),
        ("slurm.load.options", "[mail-type=FAIL]"), ("tracking.project", '"my/project"'),
        ("tracking.project", "x" * 129), ("tracking.entity", '"my team"'), ("pretrain.beta1", "1.0"),
        ("sft.max_grad_norm", "inf"), ("pretrain.learning_rate", "inf"), ("sft.weight_decay", "nan"), ("seed", 2**63),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_names_paths_and_slurm_strings_that_cannot_work(composed: Any, setting: str, value: str) -> None:
    values = copy.deepcopy(composed)
    *sections, name = setting.split(".")
    section = values
    for each in sections:
        section = section[each]
    section[name] = yaml.safe_load(str(value).replace("inf", ".inf").replace("nan", ".nan"))
    with pytest.raises(UserError) as caught:
        validate_settings(values)
    error = caught.value
    assert re.fullmatch(rf"{setting}(\.\d)?", error.setting) and "\n" not in f"{error.value}{error.rule}"


def test_a_home_directory_is_expanded_as_by_a_shell(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert _compose("+experiment=quickstart", 'output_dir="~/results"').output_dir == "/home/me/results"
    for setting in ("output_dir", "model.path"):
        error = _refusal("+experiment=quickstart", f'{setting}="~nobody-of-that-name/x"')
        assert error.setting == setting and "a user that does not exist" in error.rule


def test_an_argument_that_is_not_utf8_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("model.path=/data/gr\udcfc\udcdfe", "--config-dir=/gr\udcfc\udcdfe"):
        assert main(["+experiment=quickstart", argument]) == EXIT_REQUEST
        printed = capsys.readouterr().err
        assert printed.startswith(f"{argument.partition('=')[0]} = /") and "not UTF-8" in printed


@pytest.mark.parametrize(
    "arguments",
    [["--pasword=topsecret"], ["-k=topsecret"], ["--api-key", "topsecret"], ["-mtopsecret"], ["--job"]],
    ids=str,
)
def test_a_wrong_option_is_refused_without_its_value(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+experiment=quickstart", *arguments]) == EXIT_REQUEST
    printed = capsys.readouterr().err
    assert "topsecret" not in printed and "--help" in printed and len(printed.splitlines()) == 3


@pytest.mark.parametrize("file", ["", ".", "/no/such/file", "x" * 300, "\0"], ids=lambda file: repr(file)[:20])
def test_a_batch_job_needs_the_file_of_a_task(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--job={file}"]) == EXIT_REQUEST
    assert "the file that action=submit wrote" in capsys.readouterr().err


def test_names_with_spaces_quotes_and_other_signs_are_accepted() -> None:
    name = "Größe 1/it's 50%, [a=b] {c}"
    assert _compose("+experiment=quickstart", f'name="{name}"').name == name


def test_jobs_of_a_sweep_have_different_names_that_directories_can_have() -> None:
    files = ["data=files", f"data.instructions.path={'i' * 200}"]
    sweep = f'data.corpus.path=a/b,a-b,"a\nb",{"x" * 200}1,{"x" * 200}2'
    jobs = compose_jobs(["+experiment=quickstart", *files, f"model.path={'m' * 99},{'n' * 99}", sweep], True, None)
    names = [job.settings.name.removeprefix("quickstart/") for job in jobs]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) <= 255 and name.isprintable() for name in names)
