"""A local Hugging Face Hub: the part of the protocol that finds and downloads one model, and that finds datasets."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.weight_files import read_header

REPO = "organization/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves the files of a directory as ``organization/model``, branch ``main``.

    Attributes:
        requests: the paths of all requests.
        reports_elements: whether the Hub reports the number of weights by dtype, as it does for most models.
        refusal: an error code of the Hub, such as ``GatedRepo``, that answers every request.
        datasets: the files of every dataset, by its ID.
        gated: the datasets that this user may not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[str] = []
        self.reports_elements = True
        self.refusal: str | None = None
        self.datasets: dict[str, list[str]] = {}
        self.gated: set[str] = set()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body."""
        self.requests.append(path)
        path = path.partition("?")[0]
        if self.refusal is not None:
            return 403 if self.refusal == "GatedRepo" else 404, {"X-Error-Code": self.refusal}, b""
        if path.startswith("/api/datasets/"):
            return self._describe_dataset(path.removeprefix("/api/datasets/"))
        if path in (
            f"/api/models/{REPO}",
            f"/api/models/{REPO}/revision/main",
            f"/api/models/{REPO}/revision/{COMMIT}",
        ):
            elements = self._elements() if self.reports_elements else None
            siblings = [{"rfilename": name} for name in self._names()]
            return _json({"id": REPO, "sha": COMMIT, "siblings": siblings, "safetensors": elements})
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return _json([self._tree_entry(name) for name in self._names()])
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self._names():
            content = (self.directory / path.removeprefix(prefix)).read_bytes()
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'}, content
        code = (
            "RevisionNotFound" if "/revision/" in path else "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
        )
        return 404, {"X-Error-Code": code}, b""

    def _describe_dataset(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = path.removesuffix("/auth-check").partition("/revision/")[0]
        if repo not in self.datasets:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated and path.endswith("/auth-check"):
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        siblings = [{"rfilename": name} for name in self.datasets[repo]]
        return _json({"id": repo, "sha": COMMIT, "gated": repo in self.gated and "auto", "siblings": siblings})

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir() if path.is_file())

    def _elements(self) -> dict[str, Any] | None:
        """What the Hub reports about the weights: the number of elements by dtype."""
        elements: Counter[str] = Counter()
        for path in self.directory.glob("*.safetensors"):
            for entry in read_header(path)[0].values():
                elements[entry.dtype] += math.prod(entry.shape)
        return {"parameters": elements, "total": elements.total()} if elements else None

    def _tree_entry(self, name: str) -> dict[str, Any]:
        content = (self.directory / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def serve(directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Makes ``huggingface_hub`` use a hub with the directory as its only model."""
    from huggingface_hub import constants

    hub = FakeHub(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
