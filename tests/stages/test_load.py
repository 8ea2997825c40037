"""The load stage writes one clean safetensors directory from every kind of base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts.task import Metrics
from pipeline.errors import UserError
from pipeline.stages import load
from tests.fake_hub import COMMIT, REPO, serve
from tests.plain_settings import model_at
from tests.stages.one_task import make_task
from tests.tiny_families import SMALL, save_tiny
from tests.tiny_gguf import write_gemma3_gguf, write_gguf

Load = Callable[..., Metrics]
PROMPT = "The quick brown fox"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out: Path) -> Load:
    """``run(path, dtype="bfloat16")`` loads into ``out``."""

    def load_model(path: object, **changes: object) -> Metrics:
        return load.run(make_task("load", model_at(path, **changes), out))

    return load_model


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may modify."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def _change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def _change_weights(directory: Path, **changes: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def _logits(directory: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits: torch.Tensor = model(**tokens).logits
    return logits.detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_directory_is_cast_and_copied(run: Load, tiny_llama_dir: Path, out: Path, dtype: str) -> None:
    metrics = run(tiny_llama_dir, dtype=dtype)
    before, after = load_file(tiny_llama_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(tensor, before[name].to(getattr(torch, dtype))) for name, tensor in after.items())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_llama_dir / name).read_bytes()
    assert metrics["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert (metrics["num_hidden_layers"], metrics["model_type"], metrics["dtype"]) == (4, "llama", dtype)


def test_the_dtype_of_most_weights_is_kept_and_rounding_others_is_a_warning(run: Load, model: Path, out: Path) -> None:
    before = load_file(model / "model.safetensors")
    metrics = run(model, dtype="auto")
    assert (metrics["dtype"], "warnings" in metrics) == ("float32", False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(out / "model.safetensors").items())
    _change_weights(model, **{name: tensor.bfloat16() for name, tensor in before.items() if tensor.ndim == 2})
    metrics = run(model, dtype="auto")
    assert metrics["warnings"] == ["9 tensors are stored in float32 and rounded to bfloat16"]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_shards_are_read_by_their_index(run: Load, tiny_llama_dir: Path, tmp_path: Path, out: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(sharded, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    run(sharded)
    assert torch.equal(_logits(out), _logits(tiny_llama_dir))


def test_files_of_an_earlier_attempt_are_replaced(run: Load, tiny_llama_dir: Path, out: Path) -> None:
    out.mkdir()
    (out / "model.safetensors.index.json").write_text("{")
    (out / ".model-0.partial").write_bytes(b"half")
    run(tiny_llama_dir)
    assert {path.name for path in out.glob("*model*")} == {"model.safetensors"}


def test_derived_buffers_and_a_tied_head_are_not_stored(run: Load, model: Path, out: Path) -> None:
    embeddings = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    _change_weights(model, **{"lm_head.weight": embeddings.clone()}, **frequencies)
    run(model)
    assert not {"lm_head.weight", *frequencies} & set(load_file(out / "model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(out).config.tie_word_embeddings


def test_a_head_that_contradicts_the_config_is_rejected(run: Load, model: Path) -> None:
    embeddings = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    _change_weights(model, **{"lm_head.weight": embeddings + 1})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        run(model)


Weights = dict[str, torch.Tensor]


def _rename(weights: Weights, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


DISAGREEMENTS: dict[str, tuple[dict[str, object], Callable[[Weights], object], str]] = {
    "no head": ({"tie_word_embeddings": False}, lambda w: None, "lm_head.weight is missing"),
    "no norm": ({}, lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
    "value head": ({}, lambda w: w.update({"v_head.weight": torch.ones(1, 32)}), "v_head.weight is not in the model"),
    "another vocabulary": ({"vocab_size": 400}, lambda w: None, r"embed_tokens.weight has the shape \[384, 32\], but"),
    "a layer less": ({"num_hidden_layers": 3}, lambda w: None, r"model.layers.3.* and 6 more"),
    "integers": (
        {},
        lambda w: w.update({"model.norm.weight": torch.ones(32).int()}),
        "the dtype torch.int32",
    ),
    "activation": ({"hidden_act": "nope"}, lambda w: None, r"cannot build a model from its config.json .*nope"),
    "pad id": ({"pad_token_id": 384}, lambda w: None, "pad_token_id = 384, which must be below vocab_size"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_weights_that_are_not_those_of_the_config_are_rejected_by_name(
    run: Load, model: Path, out: Path, case: str
) -> None:
    entries, change, rule = DISAGREEMENTS[case]
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _change_config(model, **entries)
    with pytest.raises(UserError, match=rule):
        run(model)
    assert not list(out.glob("*.safetensors"))


def test_a_tied_model_may_store_only_its_head(run: Load, model: Path, tiny_llama_dir: Path, out: Path) -> None:
    weights = load_file(model / "model.safetensors")
    _rename(weights, "model.embed_tokens.weight", "lm_head.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run(model)
    assert torch.equal(_logits(out), _logits(tiny_llama_dir))


def test_ties_follow_the_config_class(run: Load, tmp_path: Path, tiny_tokenizer: Any, out: Path) -> None:
    """Gemma 2 ties the head unless its config says otherwise."""
    gemma = save_tiny("gemma2", tmp_path / "gemma", tiny_tokenizer)
    config = json.loads((gemma / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (gemma / "config.json").write_text(json.dumps(config))
    embeddings = load_file(gemma / "model.safetensors")["model.embed_tokens.weight"]
    _change_weights(gemma, **{"lm_head.weight": embeddings.clone()})
    run(gemma)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    _change_weights(gemma, **{"lm_head.weight": embeddings + 1})
    with pytest.raises(UserError, match="tie_word_embeddings, by default or as given"):
        run(gemma)


def test_a_saved_choice_of_attention_need_not_be_installed(run: Load, model: Path, out: Path) -> None:
    _change_config(model, _attn_implementation="flash_attention_2")
    run(model)
    assert _logits(out).isfinite().all()


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (
            lambda tokenizer: tokenizer["model"]["vocab"].update(beyond=384),
            "has the id 384, but its embeddings end at 383",
        ),
        (lambda tokenizer: tokenizer.update(model={"type": "Nonsense"}), "its tokenizer cannot be used"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_rejected_before_weights_are_read(
    run: Load, model: Path, out: Path, damage: Callable[[Any], object], rule: str
) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    damage(tokenizer)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=rule):
        run(model)
    assert not list(out.glob("*model*"))


def test_a_model_with_another_shape_than_stated_is_rejected(run: Load, tiny_llama_dir: Path) -> None:
    stated = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4}
    run(tiny_llama_dir, shape=stated)
    with pytest.raises(UserError, match=r"model.shape = num_hidden_layers 32: .*says num_hidden_layers 4"):
        run(tiny_llama_dir, shape={**stated, "num_hidden_layers": 32})


def test_quantized_weights_are_rejected(run: Load, model: Path) -> None:
    _change_config(model, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantized"):
        run(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_weights_that_are_not_finite_are_rejected_by_name(run: Load, model: Path, out: Path, value: float) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    broken = load_file(model / "model.safetensors")[name]
    broken[3, 4] = value
    _change_weights(model, **{name: broken})
    with pytest.raises(UserError, match=rf"model.path = .*{name} contains NaN or infinity"):
        run(model)
    assert not list(out.glob("*.safetensors"))


def test_weights_that_overflow_the_dtype_are_rejected(run: Load, model: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    _change_weights(model, **{name: torch.full((64, 32), 1e5)})
    with pytest.raises(UserError, match=rf"model.dtype = float16: {name} .*too large.*model.dtype=bfloat16"):
        run(model, dtype="float16")
    run(model, dtype="bfloat16")


def test_pickle_files_are_neither_read_nor_copied(
    run: Load, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    run(model)
    assert not (out / "pytorch_model.bin").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_model_is_copied_only_if_it_is_trusted(run: Load, model: Path, out: Path, trusted: bool) -> None:
    """The code is that of a class which is part of transformers by now, so the model can be used without it."""
    (model / "modeling_llama.py").write_text("raise RuntimeError('run')")
    _change_config(model, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, _name_or_path="/path")
    run(model, trust_remote_code=trusted)
    config = json.loads((out / "config.json").read_text())
    assert ("auto_map" in config, (out / "modeling_llama.py").exists()) == (trusted, trusted)
    assert "_name_or_path" not in config


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_needs_its_own_code_is_rejected(run: Load, model: Path, file: str) -> None:
    name = "AutoTokenizer" if file == "tokenizer_config.json" else "AutoModelForCausalLM"
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, "auto_map": {name: "custom.Custom"}}))
    with pytest.raises(UserError, match=r"its auto_map names .*custom\.Custom"):
        run(model)


@pytest.mark.parametrize(
    ("quantization", "error"), [("F32", 1e-5), ("Q8_0", 0.05), ("Q4_1", 0.5)], ids=["float32", "Q8_0", "Q4_1"]
)
def test_a_gguf_file_is_dequantized(
    run: Load, tiny_llama_dir: Path, tmp_path: Path, out: Path, quantization: str, error: float
) -> None:
    write_gguf(tiny_llama_dir, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[quantization])
    metrics = run(tmp_path, gguf_file="tiny.gguf")
    assert (metrics["num_hidden_layers"], metrics["model_type"]) == (4, "llama")
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config.get("quantization_config")) == ("float32", None)
    before, after = load_file(tiny_llama_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    scale = before["model.embed_tokens.weight"].abs().max()
    assert max((after[name] - tensor).abs().max() for name, tensor in before.items()) < error * scale
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_llama_dir)
    assert tokenizer(PROMPT).input_ids == original(PROMPT).input_ids
    assert tokenizer.chat_template == original.chat_template
    assert (out / "chat_template.jinja").is_file()


def test_a_gguf_file_is_written_in_the_requested_dtype(
    run: Load, tiny_llama_dir: Path, tmp_path: Path, out: Path
) -> None:
    write_gguf(tiny_llama_dir, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    metrics = run(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert metrics["warnings"] == ["9 tensors are stored in float32 and rounded to bfloat16"]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_gemma_3_file_becomes_its_text_model(run: Load, tmp_path: Path, tiny_tokenizer: Any, out: Path) -> None:
    """llama.cpp calls the architecture gemma3, and transformers calls the text model gemma3_text."""
    config = AutoConfig.for_model("gemma3_text", **SMALL, sliding_window=8)
    original = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    original.save_pretrained(tmp_path / "gemma")
    write_gemma3_gguf(tmp_path / "gemma", tmp_path / "gemma.gguf")
    assert run(tmp_path / "gemma.gguf")["model_type"] == "gemma3_text"
    tokens = torch.arange(3, 40)[None]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(tokens).logits, original(tokens).logits)


def test_a_hub_model_is_downloaded_at_its_commit(
    run: Load, model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unwanted in ("pytorch_model.bin", "modeling_custom.py", "README.md", "weights.onnx"):
        (model / unwanted).write_text("not needed")
    with serve(model, tmp_path / "cache", monkeypatch) as hub:
        metrics = run(REPO, revision="main")
    assert (metrics["commit"], metrics["source"]) == (COMMIT, f"hub {REPO}@{COMMIT}")
    assert torch.equal(_logits(out), _logits(model))
    downloaded = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert not downloaded & {"pytorch_model.bin", "modeling_custom.py", "README.md", "weights.onnx"}


def test_a_model_without_a_tokenizer_is_rejected(run: Load, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        run(model)
