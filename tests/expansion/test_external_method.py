"""A method from outside the repository: a module on the path, from load to report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.__main__ import compose_jobs, main
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.expansion.methods import external_method, module_fingerprint
from pipeline.files import read_json
from pipeline.planning import prepare
from pipeline.stages import expand
from tests.stages.one_task import make_task

SCALED_COPY = '''
"""Copies of the lower neighbor with scaled outputs."""

from pipeline.config.section import PositiveFloat
from pipeline.expansion.method import InsertionMethod, NewTensor, copies


class ScaledCopy(InsertionMethod):
    """Scales what a new layer adds to the residual stream."""

    title = "scaled copying"
    source = "control: the lower neighbor with scaled outputs"
    factor: PositiveFloat = 0.1

    def new_tensors(self, base, plan, work):
        for layer, tensor, value in copies(base, plan):
            yield NewTensor(layer, tensor, value * self.factor if tensor.role.side == "output" else value)
'''
DRAWING = """
import torch
from pipeline.expansion.method import InsertionMethod, NewTensor, copies


class Drawing(InsertionMethod):
    title = source = "noise"

    def new_tensors(self, base, plan, work):
        for layer, tensor, value in copies(base, plan):
            yield NewTensor(layer, tensor, value + {draw})
"""

WriteModule = Callable[[str, str], Path]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """``write_module("package.module", source)`` writes an importable module. The current directory is on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> Path:
        file = tmp_path / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.parents[: name.count(".")]:
            (folder / "__init__.py").touch()
        file.write_text(source)
        return file

    return write


def _keys(*overrides: str) -> dict[str, str]:
    command = ["+experiment=quickstart", *overrides, "action=plan"]
    run = compose_jobs(command, multirun=False, config_dir=None)[0].settings
    return {name: node.artifact.key for name, node in prepare([run])[0].nodes.items()}


def test_a_method_from_another_directory_runs_from_load_to_report(
    write_module: WriteModule, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_module("my_methods.scaled_copy", SCALED_COPY)
    chosen = [*shrunk, "expand.module=my_methods.scaled_copy", "+expand.factor=0.5", "expand.position=[1,2]"]
    chosen += ["evaluate.targets=[sft]"]
    assert main(["+experiment=quickstart", *chosen]) == EXIT_DONE
    run = tmp_path / "outputs" / "quickstart"

    recorded = read_json(run / "expand" / "expansion.json")
    assert (recorded["method"], recorded["title"], recorded["trains"]) == (
        "scaled_copy",
        "scaled copying",
        "new_layers",
    )
    assert recorded["settings"]["factor"] == 0.5
    before, after = (load_file(run / stage / "model.safetensors") for stage in ("load", "expand"))
    for module, factor in (("self_attn.o_proj", 0.5), ("mlp.down_proj", 0.5), ("mlp.up_proj", 1.0)):
        old, new = before[f"model.layers.1.{module}.weight"], after[f"model.layers.2.{module}.weight"]
        assert torch.equal(new, old * factor)
    assert "scaled_copy" in (run / "expand" / "README.md").read_text()
    training = read_json(run / "pretrain" / "training.json")
    assert 0 < training["trainable_parameters"] < training["total_parameters"] / 2
    assert {row["method"] for row in read_json(run / "report" / "results.json")} == {"scaled_copy"}
    assert "scaled copying" in (run / "report" / "report.md").read_text()

    capsys.readouterr()
    assert main(["+experiment=quickstart", *chosen]) == EXIT_DONE
    assert "all artifacts are complete" in capsys.readouterr().out

    keys = _keys(*chosen)
    file.write_text(SCALED_COPY.replace("value * self.factor", "value * self.factor**2"))
    changed = {name for name, key in _keys(*chosen).items() if key != keys[name]}
    assert changed == {"expand", "pretrain", "sft", "evaluate/sft", "report"}


def test_every_file_of_the_package_is_in_the_fingerprint(write_module: WriteModule) -> None:
    write_module("fingerprinted.method", SCALED_COPY)
    helper = write_module("fingerprinted.deeper.helper", "SCALE = 1")
    before = module_fingerprint("fingerprinted.method")
    helper.write_text("SCALE = 2")
    after = module_fingerprint("fingerprinted.method")
    assert before != after
    alone = write_module("fingerprinted_alone", SCALED_COPY)
    before = module_fingerprint("fingerprinted_alone")
    helper.write_text("SCALE = 3")
    assert module_fingerprint("fingerprinted_alone") == before
    alone.write_text(SCALED_COPY + "\n")
    assert module_fingerprint("fingerprinted_alone") != before


def test_a_custom_yaml_file_names_the_method_in_sweeps(write_module: WriteModule, tmp_path: Path) -> None:
    write_module("named_in_yaml", SCALED_COPY)
    (tmp_path / "conf" / "expand").mkdir(parents=True)
    (tmp_path / "conf" / "expand" / "mine.yaml").write_text(
        "method: mine\nmodule: named_in_yaml\nnew_layers: 2\nposition: top\nfactor: 0.25\n"
    )
    jobs = compose_jobs(["+experiment=quickstart", "expand=mine,copy"], True, tmp_path / "conf")
    assert [job.settings.name for job in jobs] == ["quickstart/expand-mine", "quickstart/expand-copy"]
    assert jobs[0].settings.expand.key_settings()["method"] == "mine"
    assert jobs[0].settings.expand.factor == 0.25


def test_an_entry_point_is_a_short_name_for_a_module(write_module: WriteModule, tmp_path: Path) -> None:
    write_module("behind_an_entry_point", SCALED_COPY)
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[depth_growth.methods]\nshort = behind_an_entry_point\n")
    assert external_method("short").title == "scaled copying"


UNUSABLE = {
    "no_such_module": (None, "it cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    "broken_module": ("import no_such_library", "it cannot be imported (ModuleNotFoundError"),
    "misspelt_module": ("def f(:", "it cannot be imported (SyntaxError"),
    "empty_module": ("", "derived from Method; this one: none"),
    "nameless_module": (SCALED_COPY.replace('    title = "scaled copying"', ""), "ScaledCopy does not set title"),
}


@pytest.mark.parametrize("action", ["run", "plan", "submit"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_module_is_refused_before_anything_starts(
    write_module: WriteModule, capsys: pytest.CaptureFixture[str], name: str, action: str
) -> None:
    source, rule = UNUSABLE[name]
    if source is not None:
        write_module(name, source)
    assert main(["+experiment=quickstart", f"expand.module={name}", f"action={action}"]) == EXIT_REQUEST
    message = capsys.readouterr().err
    assert f"expand.module = {name}" in message and rule in message and "Traceback" not in message


def test_its_settings_are_validated_like_those_of_built_in_methods(write_module: WriteModule) -> None:
    write_module("checked_settings", SCALED_COPY)
    for override, rule in (("+expand.factor=-1", "greater than 0"), ("+expand.factr=1", "there is no such setting")):
        with pytest.raises(UserError, match=rule):
            _keys("expand.module=checked_settings", override)
    with pytest.raises(UserError, match="lesa is a method of this repository"):
        _keys("expand=lesa", "expand.module=checked_settings")


@pytest.mark.parametrize("draw", ["torch.randn(())", "work.seed"])
def test_random_numbers_that_are_not_declared_fail_the_stage(
    write_module: WriteModule, tiny_llama_dir: Path, tmp_path: Path, draw: str
) -> None:
    name = f"drawing_{draw[:4]}"
    write_module(name, DRAWING.replace("{draw}", draw))
    settings = {
        "method": name, "module": name, "new_layers": 1, "position": "top", "device": "cpu", "check_memory": 0,
        "probe_tokens": 1,
    }  # fmt: skip
    method = external_method(name).model_validate(settings)
    with pytest.raises(RuntimeError, match="draws_random_numbers = True"):
        expand.run(make_task("expand", method, tmp_path / "out", {"load": tiny_llama_dir}))
