"""Fixtures of the tests of studies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.training import job
from tests.study.one_worker import TrainingWorker


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingWorker]:
    """Makes all training stages of this process run in one process instead of one each."""
    worker = TrainingWorker(tmp_path_factory.mktemp("worker"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_workers", worker)
        yield worker
    worker.close()
