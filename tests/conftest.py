"""Fixtures shared by all tests: tiny random models, data and settings, without a network or real weights."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import AnyExpand
from tests import tiny_inputs, warm


def pytest_configure() -> None:
    """Creates the replacement for the interpreter in the first process, which shares it with its xdist workers."""
    if warm.VARIABLE not in os.environ:
        os.environ[warm.VARIABLE] = str(warm.install())
    warm.parse_configuration_once()


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> Iterator[None]:
    """Makes stages, launchers and ranks that this process starts skip their imports; see ``tests.warm``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", os.environ[warm.VARIABLE])
        yield


@pytest.fixture
def real_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test start new interpreters, as in production."""
    monkeypatch.setattr(sys, "executable", warm.REAL)


def pytest_collection_finish() -> None:
    """Applies the pipeline's settings for vector math to tests that compute in this process.

    What has been imported is never garbage, and looking through it takes half a second each time.
    """
    gc.collect()
    gc.freeze()
    if "torch" in sys.modules:
        from pipeline.models.vector_math import initialize_vector_math

        initialize_vector_math()


def pytest_unconfigure() -> None:
    """Excludes all objects from the garbage collections with which pytest ends, since these take seconds."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """See ``tests.tiny_inputs``."""
    return tiny_inputs.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """See ``tests.tiny_inputs``."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    tiny_inputs.write_llama(directory, tiny_tokenizer)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_with_bos(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that prepends ``<|endoftext|>`` to every text, like Llama's BOS token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("with_bos") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tests.tiny_inputs``."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    tiny_inputs.write_corpus(path)
    return path


@pytest.fixture(scope="session")
def tiny_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tests.tiny_inputs``."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    tiny_inputs.write_chats(path)
    return path


@pytest.fixture(scope="session")
def shrunk(tiny_llama_dir: Path, tiny_corpus: Path, tiny_chats: Path) -> list[str]:
    """Overrides that make any experiment run on the tiny model within seconds."""
    return tiny_inputs.shrinking_overrides(tiny_llama_dir, tiny_corpus, tiny_chats)


@pytest.fixture(scope="session")
def expand_settings() -> Callable[..., AnyExpand]:
    """See ``tests.tiny_inputs``."""
    return tiny_inputs.expand_settings
