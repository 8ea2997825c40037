import os
import time
from pathlib import Path

import pytest

from pipeline.artifacts.store import ATTEMPTS_FILE, begin_attempt, finish_attempts
from pipeline.files import read_json, write_json


def test_killed_attempts_count_until_their_last_file(tmp_path: Path):
    begin_attempt(tmp_path)
    write_json(tmp_path / ATTEMPTS_FILE, [{"started": 1000.0, "seconds": None}])
    (tmp_path / "metrics.jsonl").touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1030.0, 1030.0))
    begin_attempt(tmp_path)
    first, second = read_json(tmp_path / ATTEMPTS_FILE)
    assert first == {"started": 1000.0, "seconds": 30.0}
    assert second["started"] == pytest.approx(time.time(), abs=5)
    number, seconds = finish_attempts(tmp_path)
    assert number == 2 and 30.0 <= seconds < 35.0
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def test_one_attempt_is_as_long_as_it_took(tmp_path: Path):
    begin_attempt(tmp_path)
    time.sleep(0.05)
    number, seconds = finish_attempts(tmp_path)
    assert number == 1 and 0.05 <= seconds < 5.0
