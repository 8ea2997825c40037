"""The expand stage from directory to directory: every method at every position, and the files that users rely on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.__main__ import main
from pipeline.artifacts.task import Metrics
from pipeline.config import METHODS, AnyExpand
from pipeline.errors import EXIT_DONE, EXIT_FAILED, UserError
from pipeline.expansion import self_check
from pipeline.files import read_json, write_json
from pipeline.stages import expand
from tests.stages.one_task import make_task

ExpandSettings = Callable[..., AnyExpand]
POSITIONS = ["top", "middle", "bottom", "interleaved", [0, 2, 2]]
OWN_PLACEMENT = ("solar", "stack")  # they do not accept a list
CASES = [
    (method, position) for method in METHODS for position in (POSITIONS[:-1] if method in OWN_PLACEMENT else POSITIONS)
]
SMALL_LESA = {"epochs": 1, "hidden_size": 16}
TEXT = "Return the number of items in a container."


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _run(base: Path, settings: AnyExpand, out: Path, seed: int = 0) -> Metrics:
    return expand.run(make_task("expand", settings, out, {"load": base}, seed))


def _read_expansion(out: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((out / "expansion.json").read_text())
    return described


@torch.inference_mode()
def _logits(directory: Path) -> Tensor:
    tokens = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")
    logits: Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(**tokens).logits
    return logits


def _layer(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("method", "position"), CASES, ids=str)
def test_every_method_at_every_position(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path, method: str, position: object
) -> None:
    small = SMALL_LESA if method == "lesa" else {}
    settings = expand_settings(method, new_layers=3, position=position, **small)
    metrics = _run(tiny_llama_dir, settings, out)

    described = _read_expansion(out)
    layers = described["layers"]
    assert (described["method"], described["num_base_layers"]) == (method, 4)
    assert described["num_layers"] == len(layers) == 4 + settings.new_layers
    assert [row["layer"] for row in layers] == list(range(len(layers)))
    assert metrics["new_layers"] == [row["layer"] for row in layers if row["new"]]
    assert AutoConfig.from_pretrained(out).num_hidden_layers == len(layers)

    base, deeper = load_file(tiny_llama_dir / "model.safetensors"), load_file(out / "model.safetensors")
    for row in layers:
        if not row["new"] or method in ("solar", "stack", "copy"):
            source = _layer(base, row["from"][0])
            made = _layer(deeper, row["layer"])
            assert set(made) == set(source)
            assert all(torch.equal(made[name], tensor) for name, tensor in source.items()), row
    outside = {name for name in base if "layers" not in name}
    assert all(torch.equal(deeper[name], base[name]) for name in outside)
    if method in ("llama_pro", "opt_deus", "random_init", "none"):
        assert torch.equal(_logits(out), _logits(tiny_llama_dir))
        assert metrics["check"]["logit_difference"] == 0.0
    else:
        assert metrics["check"]["logit_difference"] is None


def test_lesa_with_zeroed_outputs_keeps_the_logits(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path
) -> None:
    settings = expand_settings("lesa", new_layers=2, zero_init=True, **SMALL_LESA)
    assert _run(tiny_llama_dir, settings, out)["check"]["logit_difference"] == 0.0
    assert torch.equal(_logits(out), _logits(tiny_llama_dir))


def test_cached_generation_equals_uncached(expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path) -> None:
    _run(tiny_llama_dir, expand_settings("average", new_layers=3, position="middle"), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")
    cached, uncached = (
        model.generate(**tokens, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_new_tensors_have_the_dtype_of_the_base(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, out: Path
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(base)
    _run(base, expand_settings("average", new_layers=1, position=[1]), out)
    source, deeper = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in deeper.values()} == {torch.bfloat16}
    for name, made in _layer(deeper, 2).items():
        lower, upper = _layer(source, 1)[name].float(), _layer(source, 2)[name].float()
        assert torch.equal(made, ((lower + upper) / 2).bfloat16())
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_expansion_json_lists_where_every_layer_comes_from(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path
) -> None:
    settings = expand_settings("copy", new_layers=3, position=[0, 0, 3])
    _run(tiny_llama_dir, settings, out)
    described = _read_expansion(out)
    assert described["layers"] == [
        {"layer": 0, "new": False, "from": [0]},
        {"layer": 1, "new": True, "from": [0, 1]},
        {"layer": 2, "new": True, "from": [0, 1], "made_from": [1, 3]},
        {"layer": 3, "new": False, "from": [1]},
        {"layer": 4, "new": False, "from": [2]},
        {"layer": 5, "new": False, "from": [3]},
        {"layer": 6, "new": True, "from": [3]},
    ]
    assert described["settings"] == {"method": "copy", "new_layers": 3, "position": [0, 0, 3]}
    assert described["source"].startswith("control")


def test_none_is_the_base(expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path) -> None:
    _run(tiny_llama_dir, expand_settings("none", new_layers=8, position="top"), out)
    base, same = load_file(tiny_llama_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(base) == set(same)
    assert all(torch.equal(same[name], tensor) for name, tensor in base.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((tiny_llama_dir / "config.json").read_text())
    assert _read_expansion(out)["settings"] == {"method": "none", "new_layers": 0, "position": None}


def test_none_records_the_layers_that_matched_training_trains(
    shrunk: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Training moves exactly these, and as many parameters as the new layers of a copy would have."""
    chosen = ["expand=none", "expand.new_layers=2", "expand.position=[0,2]", "pretrain.trainable=matched"]
    command = ["+experiment=quickstart", *shrunk, f"output_dir={tmp_path}", "stages=[pretrain]", *chosen]
    assert main(command) == EXIT_DONE
    assert _read_expansion(tmp_path / "quickstart" / "expand")["matched"] == [0, 2]
    before, after = (load_file(tmp_path / "quickstart" / stage / "model.safetensors") for stage in ("load", "pretrain"))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if ".layers.0." in name or ".layers.2." in name}


@pytest.mark.parametrize("position", ["least_important", "most_similar"])
def test_layers_are_ranked_on_training_text_through_the_driver(
    shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], position: str
) -> None:
    """The ranking is in the manifest and decides the gaps, and ``none`` trains the layers below the same gaps."""
    command = ["+experiment=quickstart", *shrunk, f"output_dir={tmp_path}", f"expand.position={position}"]
    command += ["expand.probe_tokens=128"]
    assert main([*command, "action=plan"]) == EXIT_DONE
    assert f"2 new by {position}, known once" in capsys.readouterr().out
    assert main([*command, "stages=[expand]", "expand=copy"]) == EXIT_DONE
    done = tmp_path / "quickstart" / "expand"
    metrics = json.loads((done / "manifest.json").read_text())["metrics"]
    values = metrics["ranking"]["values"]
    chosen = sorted(sorted(range(4), key=values.__getitem__)[:2])
    assert [row["from"][0] for row in _read_expansion(done)["layers"] if row["new"]] == chosen
    assert _read_expansion(done)["settings"] == {
        "method": "copy", "new_layers": 2, "position": position, "probe_tokens": 128,
    }  # fmt: skip
    assert not [file for file in done.iterdir() if file.name.startswith(".")]
    capsys.readouterr()
    assert main([*command, "expand=copy", "action=plan"]) == EXIT_DONE
    assert "known once" not in capsys.readouterr().out
    assert main([*command, "stages=[expand]", "expand=none", "pretrain.trainable=matched"]) == EXIT_DONE
    assert _read_expansion(done)["matched"] == chosen


def test_solar_warns_that_it_has_its_own_placement(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path
) -> None:
    metrics = _run(tiny_llama_dir, expand_settings("solar", new_layers=2, position="top"), out)
    (warning,) = metrics["warnings"]
    assert "overlap" in warning
    assert _read_expansion(out)["settings"]["position"] == "overlap"
    assert [row["from"] for row in _read_expansion(out)["layers"]] == [[0], [1], [2], [1], [2], [3]]


def test_only_the_seed_changes_lesa(expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = expand_settings("lesa", new_layers=1, position=[1], **SMALL_LESA)
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        _run(tiny_llama_dir, settings, tmp_path / str(index), seed)
        weights.append(load_file(tmp_path / str(index) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert not torch.equal(*(w["model.layers.2.mlp.up_proj.weight"] for w in (weights[0], weights[2])))


def test_files_other_than_weights_are_copied_byte_for_byte(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, out: Path
) -> None:
    """Tokenizer, chat template and generation config, even if libraries would write them differently."""
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in names:
        with open(base / name, "a") as file:
            file.write("\n\n")
    for name in ("added_tokens.json", "special_tokens_map.json"):  # as older libraries wrote them
        (base / name).write_text("{ }")
    # With model.trust_remote_code=true, the load stage keeps both.
    auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    write_json(base / "config.json", {**read_json(base / "config.json"), "auto_map": auto_map})
    (base / "modeling_llama.py").write_text("raise RuntimeError('run')")
    _run(base, expand_settings("copy", new_layers=1), out)
    for name in (*names, "added_tokens.json", "special_tokens_map.json", "modeling_llama.py"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


def test_per_layer_config_entries_follow_the_layers(
    expand_settings: ExpandSettings, tiny_tokenizer: Any, tmp_path: Path, out: Path
) -> None:
    """A Qwen2, which has biases, with a sliding window in the upper half."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    _run(base, expand_settings("opt_deus", new_layers=2, position=[0, 2]), out)
    deeper = AutoConfig.from_pretrained(out)
    assert deeper.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert deeper.max_window_layers == 3
    assert torch.equal(_logits(out), _logits(base))


def test_a_killed_attempt_is_overwritten(expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path) -> None:
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"truncated")
    (out / "model.safetensors.index.json").write_text("{")
    (out / "expansion.json").write_text("{")
    _run(tiny_llama_dir, expand_settings("copy", new_layers=1), out)
    assert {path.name for path in out.glob("model*")} == {"model.safetensors"}
    assert _read_expansion(out)["num_layers"] == 5


def test_a_failed_check_fails_the_stage(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "CACHE_TOLERANCE", -1.0)
    with pytest.raises(self_check.CheckFailedError, match="cached decoding"):
        _run(tiny_llama_dir, expand_settings("copy", new_layers=1), out)


FAULTY_METHOD = """
import os
from pipeline.expansion.method import InsertionMethod, NewTensor, copies, silenced

class Faulty(InsertionMethod):
    title = source = "faulty"
    keeps_logits = property(lambda self: True)

    def new_tensors(self, base, plan, work):
        for layer, tensor, value in copies(base, plan):
            yield NewTensor(layer, tensor, value if "FAULTY" in os.environ else silenced(tensor, value))
"""


def test_a_failed_check_leaves_no_artifact(
    shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the driver: one message, no manifest, no link, and the same command rebuilds it."""
    (tmp_path / "faulty_method.py").write_text(FAULTY_METHOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["+experiment=quickstart", *shrunk, "output_dir=.", "stages=[expand]", "expand.module=faulty_method"]
    with monkeypatch.context() as patch:
        patch.setenv("FAULTY", "1")
        assert main(command) == EXIT_FAILED
    message = capsys.readouterr().err
    assert "stage expand" in message and "its logits differ from the base's" in message
    artifacts, link = tmp_path / "artifacts" / "expand", tmp_path / "quickstart" / "expand"
    assert list(artifacts.glob("*.partial")) and not list(artifacts.rglob("manifest.json")) and not link.exists()
    assert main(command) == EXIT_DONE
    assert (link / "manifest.json").is_file() and not list(artifacts.glob("*.partial"))


def test_a_family_that_cannot_be_inferred_is_refused(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, out: Path
) -> None:
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    write_json(base / "config.json", {**json.loads((base / "config.json").read_text()), "model_type": "bert"})
    with pytest.raises(UserError, match=r"bert.*attends to later tokens.*pipeline/models/families/table\.py"):
        _run(base, expand_settings("copy", new_layers=1), out)
