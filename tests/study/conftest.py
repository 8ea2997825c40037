"""Fixtures of the tests of studies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.errors import EXIT_DONE
from pipeline.training import job
from tests.study.one_worker import TrainingWorker
from tests.study.small_study import Workplace, study_arguments
from tests.tiny_inputs import coarse_plots


@pytest.fixture(autouse=True, scope="module")
def _coarse_plots() -> Iterator[None]:
    with coarse_plots():
        yield


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingWorker]:
    """Makes all training stages of this process run in one process instead of one each."""
    worker = TrainingWorker(tmp_path_factory.mktemp("worker"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_workers", worker)
        yield worker
    worker.close()


@pytest.fixture(scope="module")
def arguments(shrunk: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """See ``study_arguments``."""
    return study_arguments(shrunk, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def finished(arguments: list[str], one_worker: TrainingWorker, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished study of two contenders."""
    place = Workplace(tmp_path_factory.mktemp("study"), arguments)
    place.write()
    assert place.run() == EXIT_DONE
    return place
