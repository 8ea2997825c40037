"""Exports: what is uploaded to a hub, the model card, llama.cpp's converter, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.__main__ import compose_jobs, main
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST
from pipeline.export.card import card_of
from pipeline.export.gguf import convert
from pipeline.files import read_json, write_json
from tests.report.finished_runs import finished_run

REPOSITORY = "someone/deeper"


class UploadHub:
    """A local Hugging Face Hub that accepts one repository: what an upload needs of the protocol."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] | None = None
        self.tokens: set[str] = set()
        self.commits = 0
        self._stored: dict[str, bytes] = {}  # large files by their SHA-256

    def answer(self, method: str, path: str, body: bytes, address: str) -> tuple[int, object]:
        """Returns status and JSON body."""
        path = path.partition("?")[0]
        if method == "PUT":
            self._stored[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{address}/{REPOSITORY}", "id": REPOSITORY}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            files = json.loads(body)["files"]
            large = [{**file, "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                      "shouldIgnore": False} for file in files]  # fmt: skip
            return 200, {"files": large}
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            upload = [{**each, "actions": {"upload": {"href": f"{address}/store/{each['oid']}"}}} for each in objects]
            return 200, {"transfer": "basic", "objects": upload}
        if path == f"/api/models/{REPOSITORY}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{address}/{REPOSITORY}/commit/1", "commitOid": "1" * 40}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return (200, {"id": REPOSITORY, "sha": "0" * 40}) if method == "GET" else (404, {})

    def _commit(self, entries: list[dict[str, dict[str, str]]]) -> None:
        self.commits += 1
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self._stored[value["oid"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    from huggingface_hub import constants

    hub = UploadHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # The storage of large files has signed addresses, and huggingface_hub's daily request is anonymous.
            if self.command != "PUT" and self.path != "/api/agent-harnesses":
                hub.tokens.add(self.headers.get("Authorization", ""))
            status, content = hub.answer(self.command, self.path, body, constants.ENDPOINT)
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A model directory with what an artifact has besides, and with paths of this machine."""
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    for name in ("config.json", "tokenizer_config.json"):
        write_json(model / name, {**read_json(model / name), "_name_or_path": str(tmp_path)})
    (model / "logs").mkdir()
    write_json(model / "manifest.json", {"settings": {"path": str(tmp_path)}})
    (model / "README.md").write_text("# mine\n")
    return model


def _name_code(model: Path) -> None:
    """Adds code that config.json names."""
    write_json(model / "config.json", {**read_json(model / "config.json"), "auto_map": {"AutoConfig": "code.Config"}})
    (model / "code.py").touch()


def _export(model: Path, *arguments: str) -> int:
    return main(["+experiment=quickstart", "action=export", f"target={model}", *arguments])


def test_an_upload_is_the_model_without_paths_of_this_machine(hub: UploadHub, model: Path, tmp_path: Path) -> None:
    assert _export(model, f"export.repository={REPOSITORY}") == EXIT_DONE
    assert hub.created is not None and hub.created["visibility"] == "private" and hub.commits == 1
    assert hub.tokens == {"Bearer a-token"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(hub.files)
    assert not {"manifest.json", "logs"} & set(hub.files)
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    for name, content in hub.files.items():
        (loaded / name).write_bytes(content)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (model, loaded))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_dry_run_lists_the_files_and_sends_nothing(
    hub: UploadHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _name_code(model)
    assert _export(model, f"export.repository={REPOSITORY}", "dry_run=true") == EXIT_DONE
    printed = capsys.readouterr().out
    size = (model / "model.safetensors").stat().st_size
    assert re.search(rf"{size:,} bytes  model.safetensors", printed) and "manifest.json" not in printed
    assert "code.py" in printed
    assert f"private repository {REPOSITORY}" in printed
    assert hub.created is None and not hub.tokens


@pytest.mark.parametrize("obstacle", ["offline", "no login", "no repository", "a refusal", "a wrong name"])
def test_an_upload_that_cannot_work_is_refused(
    obstacle: str, hub: UploadHub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    repository, expected = f"export.repository={REPOSITORY}", ""
    if obstacle == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        expected = "HF_HUB_OFFLINE = 1"
    elif obstacle == "no login":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(model / "no token"))
        expected = "hf auth login"
    elif obstacle == "no repository":
        repository, expected = "export.repository=null", "Set export.repository=ORGANIZATION/NAME"
    elif obstacle == "a refusal":
        monkeypatch.setattr(hub, "answer", lambda *arguments: (403, {"error": "you may not write here"}))
        expected = "does not accept it"
    else:
        repository, expected = "export.repository=deeper", "export.repository"
    assert _export(model, repository) == EXIT_REQUEST
    assert expected in capsys.readouterr().err
    assert not hub.files


def test_the_card_says_what_the_model_is_and_names_no_local_path(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "quickstart", "llama_pro")
    for role, kind, path in (("corpus", "hub", "org/texts"), ("instructions", "files", str(tmp_path / "chats"))):
        source = {"kind": kind, "path": path, "config_name": None, "split": "train", "revision": "abc"}
        write_json(run.directories[f"tokenize/{role}"] / "dataset.json", {"sources": [source]})
    expansion = run.directories["expand"] / "expansion.json"
    paper = "LLaMA Pro: Progressive LLaMA with Block Expansion, arXiv 2401.02415"
    write_json(expansion, {**read_json(expansion), "source": paper})
    load = run.directories["load"] / "manifest.json"
    write_json(load, {**read_json(load), "settings": {"path": str(tmp_path / "base"), "revision": None}})
    card = card_of(run, "sft", REPOSITORY)
    assert card.startswith("---\nlibrary_name: transformers") and "- llama_pro\n---" in card
    assert "from 6 to 8 layers; new layers: 4, 6" in card
    assert "Continued pre-training on org/texts train abc: 10 steps, 1,000 tokens, 1e+12 FLOPs" in card
    assert "Instruction tuning on local files" in card and "400,000 of 1,900,000" in card
    assert "eprint = {2401.02415}" in card and f'from_pretrained("{REPOSITORY}")' in card
    assert "| 26.60 ± 0.40" in card or "26.6" in card  # word perplexity of the pre-trained model
    assert str(tmp_path) not in card
    assert "Instruction tuning" not in card_of(run, "pretrain", REPOSITORY)
    base = card_of(run, "load", REPOSITORY)
    assert "Continued pre-training" not in base and "Citation" not in base and "- llama_pro" not in base


# ------------------------------------------------------------------------------------------------- gguf


def test_a_missing_converter_is_named_with_the_command_that_installs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.export.gguf.INSTALLED", tmp_path / "none" / "convert_hf_to_gguf.py")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _export(model, "export.format=gguf") == EXIT_REQUEST
    message = capsys.readouterr().err
    assert message.startswith("export.converter = null") and f"--target {tmp_path / 'none'} convert-hf-to" in message


def test_a_failed_conversion_shows_why_and_leaves_no_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converter, out = tmp_path / "convert_hf_to_gguf.py", tmp_path / "out" / "model.gguf"
    converter.write_text(
        "import sys\nopen(sys.argv[3], 'w').write('half')\nprint(sys.argv)\nsys.exit('Model Unheard is not supported')"
    )
    arguments = ["export.format=gguf", f"export.converter={converter}", f"export.path={out}", "export.outtype=f32"]
    assert _export(model, *arguments, "dry_run=true") == EXIT_DONE
    assert not out.parent.exists() and str(out) in capsys.readouterr().out
    assert _export(model, *arguments) == EXIT_FAILED
    message = capsys.readouterr().err
    assert "converter ended with exit status 1" in message and "Model Unheard is not supported" in message
    assert "'--outtype', 'f32'" in message and list(out.parent.iterdir()) == []


def test_relative_paths_of_the_converter_and_the_model_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tools").mkdir()
    _name_code(model)  # which converters run
    Path("tools/convert_hf_to_gguf.py").write_text(
        "import os, sys\nassert 'code.py' not in os.listdir(sys.argv[1])\nopen(sys.argv[3], 'w').write(sys.argv[1])"
    )
    arguments = ["export.format=gguf", "export.converter=tools/convert_hf_to_gguf.py", f"output_dir={tmp_path}/o"]
    assert _export(Path("model"), *arguments) == EXIT_DONE
    (written,) = tmp_path.glob("o/**/*.gguf")
    assert written == tmp_path / "o" / "quickstart" / "export" / "model-auto.gguf"  # not named after the run
    assert Path(written.read_text()).name == "model"
    Path("tuned").symlink_to("model")  # as <output_dir>/<name>/sft links to an artifact
    Path("files").mkdir()
    assert _export(Path("tuned"), *arguments, "export.path=files") == EXIT_DONE
    assert Path(Path("files/tuned-auto.gguf").read_text()).name == "tuned"


def test_an_interrupted_conversion_leaves_no_file(model: Path, tmp_path: Path) -> None:
    converter, out = tmp_path / "convert_hf_to_gguf.py", tmp_path / "out" / "model.gguf"
    converter.write_text(
        "import os, signal, sys, time\nopen(sys.argv[3], 'w').write('half')\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    )
    run = compose_jobs(["+experiment=quickstart"], False, None)[0].settings
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(converter, model, out, run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(out.parent.iterdir()) == []
