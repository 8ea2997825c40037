"""Language models inside models that read images: only their layers change, and transformers loads the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.__main__ import compose_jobs
from pipeline.config import AnyExpand
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.families import shape_of
from pipeline.models.source import config_of, resolve
from pipeline.planning import prepare
from pipeline.planning.plan import Plan, make_plans
from pipeline.stages import expand, load
from tests.plain_settings import model_at
from tests.stages.one_task import make_task
from tests.tiny_nested import CONFIGS, tiny_outer

TOKENS = torch.arange(3, 40)[None]
METHODS = [(family, "llama_pro", "top") for family in CONFIGS]
METHODS += [("gemma3", "llama_pro", "bottom"), ("mistral3", "average", "bottom"), ("qwen2_5_vl", "opt_deus", "bottom")]


@pytest.fixture(scope="module")
def loaded_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """Returns what the load stage makes of a tiny model of a family, with the model itself in ``original``."""

    def make(family: str) -> Path:
        place = tmp_path_factory.mktemp(family)
        tiny_outer(family).save_pretrained(place / "original")
        tiny_tokenizer.save_pretrained(place / "original")
        (place / "original" / "preprocessor_config.json").write_text("{}")
        load.run(make_task("load", model_at(place / "original"), place / "load"))
        return place / "load"

    return cache(make)


@pytest.mark.parametrize(("family", "method", "position"), METHODS)
def test_only_the_layers_of_the_language_model_change(
    family: str,
    method: str,
    position: str,
    loaded_of: Callable[[str], Path],
    expand_settings: Callable[..., AnyExpand],
    tmp_path: Path,
) -> None:
    base, out = loaded_of(family), tmp_path / "out"
    settings = expand_settings(method, new_layers=2, position=position)
    metrics = expand.run(make_task("expand", settings, out, {"load": base}))
    assert (metrics["num_base_layers"], metrics["num_layers"]) == (4, 6)

    before, after = (load_file(path / "model.safetensors") for path in (base.parent / "original", out))
    outside = [name for name in before if not _is_layer(name)]
    assert any("vision" in name or "visual" in name for name in outside) and any(
        "embed_tokens" in name for name in outside
    )
    assert {name for name in after if not _is_layer(name)} == set(outside)
    assert all(torch.equal(before[name], after[name]) for name in outside)

    old, new = (read_json(path / "config.json") for path in (base, out))
    sources = [row["from"][0] for row in read_json(out / "expansion.json")["layers"]]
    kinds, deeper_kinds = (AutoConfig.from_pretrained(path).text_config.to_dict() for path in (base, out))
    for name in ("layer_types", "no_rope_layers"):
        if kinds.get(name) is not None:
            assert deeper_kinds[name] == [kinds[name][source] for source in sources], name
    assert {**new, "text_config": None} == {**old, "text_config": None}

    original, (model, report) = _model(base.parent / "original")[0], _model(out)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits, expected = model(TOKENS, use_cache=False).logits, original(TOKENS, use_cache=False).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, expected) == (method != "average")
    assert (out / "preprocessor_config.json").read_text() == "{}"
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()


def _is_layer(name: str) -> bool:
    return name.startswith(("language_model.model.layers.", "model.layers."))


def _model(directory: Path) -> Any:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return loaded


def test_a_plan_is_of_the_language_model_and_says_which_ones_do_not_train(
    loaded_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = loaded_of("mistral3").parent / "original"
    plan = _plan(original, tmp_path, "pretrain.trainable=/model.norm/")
    assert not plan.blockers and plan.sizes is not None and plan.disk is not None
    stored = load_file(original / "model.safetensors")
    assert plan.sizes.base.parameters + plan.outer_parameters == sum(tensor.numel() for tensor in stored.values())
    assert plan.training[0].trained.names == {"model.norm.weight"}

    llama4 = loaded_of("llama4").parent / "original"
    refused = [str(blocker.fault) for blocker in _plan(llama4, tmp_path).blockers]
    assert refused and all("Llama4ForCausalLM is not divided" in fault for fault in refused)
    assert not _plan(llama4, tmp_path, "stages=[evaluate]", "evaluate.targets=[load,expand]").blockers


def _plan(model: Path, output_dir: Path, *arguments: str) -> Plan:
    command = ["+experiment=quickstart", "model=hub", f"model.path={model}", f"output_dir={output_dir}", *arguments]
    short = ["expand.new_layers=2", "pretrain.sequence_length=64", "sft.sequence_length=64"]
    job = compose_jobs([*command, *short, "action=plan"], False, None)[0]
    (plan,) = make_plans(prepare([job.settings]))
    return plan


def test_a_published_config_without_text_config_is_the_same(loaded_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As of Qwen2.5-VL on the Hub."""
    base = loaded_of("qwen2_5_vl")
    for file in (base.parent / "original").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(tmp_path / "config.json")
    text = config.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}))
    load.run(make_task("load", model_at(tmp_path), tmp_path / "out"))
    one, other = (AutoConfig.from_pretrained(path).to_dict() for path in (base, tmp_path / "out"))
    assert {**one, "_name_or_path": None} == {**other, "_name_or_path": None}
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


def test_what_a_published_config_leaves_out_has_the_defaults_of_its_class() -> None:
    """The language model of Gemma 3 4B is given by these entries, here with fewer layers."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 2,
        "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config).text_config)
    expected = {f"language_model.{name}": tuple(tensor.shape) for name, tensor in built.named_parameters()}
    assert {name: shape for name, _, shape in shape_of(config).tensors()} == expected


def test_an_outer_model_that_is_not_known_is_refused(loaded_of: Callable[[str], Path], tmp_path: Path) -> None:
    original = loaded_of("llava").parent / "original"
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "aria"}))
    with pytest.raises(UserError, match="families gemma3, mistral3, llama4, llava, qwen2_5_vl"):
        load.run(make_task("load", model_at(tmp_path), tmp_path / "out"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {}}))
    with pytest.raises(UserError, match="no num_hidden_layers"):
        config_of(resolve(model_at(tmp_path)))
