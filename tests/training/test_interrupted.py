"""Runs that are stopped by a signal to any rank, or killed while saving, end with bitwise identical results."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.errors import EXIT_REQUEST
from pipeline.files import read_json, sha256_json, write_json
from pipeline.launch.failure import rank_log
from pipeline.launch.workers import OUTCOME_FILE
from pipeline.training import checkpoint
from pipeline.training.job import CHECKPOINTS, LOGS, START_FILE, TRAINING_FILE
from tests.training.forked import ForkedRanks, Launch
from tests.training.small import logged, train_settings

pytestmark = pytest.mark.xdist_group("distributed")

RANKS, SAVE_EVERY = 2, 3
FILE_EVENTS_PER_SAVE = 8  # directories made, files opened and renamed; more with two ranks, or a partial one before
FIRST_INSIDE = 3  # before this event the partial directory may not exist yet
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "grad_norm/rest", "held_out_loss", "tokens", "flops")
MakeTask = Callable[..., StageTask]


@dataclass(frozen=True)
class Interruption:
    """How an attempt ends: by a signal some time after some steps, or by ``kill -9`` of rank 0 at a file event."""

    number: signal.Signals
    rank: int = 0
    steps: int = 0
    delay: float = 0.0  # seconds after those steps
    file_event: int | None = None


def interruptions(seed: int, few: bool) -> list[Interruption]:
    """Returns six in random order: three stop requests, one kill, and two kills while saving; or one of each kind."""
    chance = random.Random(seed)

    def anywhere(number: signal.Signals) -> Interruption:
        return Interruption(number, chance.randrange(RANKS), chance.randint(0, 2), chance.uniform(0, 0.03))

    stops = [signal.SIGTERM] if few else [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]
    found = [anywhere(number) for number in [*stops, signal.SIGKILL]]
    for _ in range(1 if few else 2):
        found.append(Interruption(signal.SIGKILL, file_event=chance.randint(FIRST_INSIDE, FILE_EVENTS_PER_SAVE - 1)))
    chance.shuffle(found)
    return found


def last_step(task: StageTask) -> int:
    """Returns the last logged step, or 0 before the first."""
    path = task.out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def interrupt(launch: Launch, task: StageTask, how: Interruption) -> dict[int, int]:
    """Waits for the right moment, sends the signal, and waits for the ranks to end.

    After a kill, the log contains steps that were not saved, until the ranks drop them and announce their start.
    """
    if how.file_event is None:
        first = saved_step(task)
        while not ((task.out / LOGS / START_FILE).exists() and last_step(task) > first + how.steps):
            time.sleep(0.001)
        time.sleep(how.delay)
        launch.kill(how.rank, how.number)
    return launch.wait()


def saved_step(task: StageTask) -> int:
    """Returns the step of the newest intact checkpoint, or 0 if there is none."""
    found = checkpoint.newest(task.out / CHECKPOINTS, print)
    return 0 if found is None else found.step


@pytest.mark.parametrize(
    "seed, few, changes",
    [(1, False, {}), (2, True, {"precision": "bfloat16", "deepspeed": {"zero_stage": 3}})],
    ids=["ZeRO 2 float32", "ZeRO 3 bfloat16"],
)
def test_interruptions_change_nothing(
    make_task: MakeTask, forked_ranks: ForkedRanks, seed: int, few: bool, changes: dict
):
    """Few at ZeRO 3, whose steps take several times as long."""
    settings = train_settings(
        steps=20 if few else 40,
        checkpoint_every_steps=SAVE_EVERY,
        evaluate_at=[0.0, 0.2, 0.5, 1.0],
        snapshot_at=[0.1],
        **changes,
    )
    straight, broken = make_task(settings, RANKS), make_task(settings, RANKS)
    assert set(forked_ranks.work(straight).wait().values()) == {0}
    for how in interruptions(seed, few):
        request = {} if how.file_event is None else {"die_at_file_event": how.file_event}
        statuses = interrupt(forked_ranks.work(broken, **request), broken, how)
        assert not (broken.out / TRAINING_FILE).exists(), "training finished before it was interrupted"
        if how.number == signal.SIGKILL:
            assert statuses[how.rank] == -signal.SIGKILL, how
            assert how.file_event is None or list((broken.out / CHECKPOINTS).glob("*.partial")), how  # while saving
        else:  # both ranks stopped after the same step, saved, and exited successfully
            assert set(statuses.values()) == {0}, how
            assert read_json(broken.out / "logs" / OUTCOME_FILE) == {"status": "stopped"}
            assert saved_step(broken) == last_step(broken)
    assert set(forked_ranks.work(broken).wait().values()) == {0}
    for name in COMPARED:
        assert logged(broken, name) == logged(straight, name), name
    for file in ("model.safetensors", "on_the_way/10/model.safetensors"):
        ours, theirs = (load_file(task.out / file) for task in (broken, straight))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def straight(make_task: MakeTask, forked_ranks: ForkedRanks) -> StageTask:
    """A finished run of six steps on one rank."""
    task = make_task(train_settings(steps=6, checkpoint_every_steps=2))
    assert forked_ranks.work(task).wait() == {0: 0}
    return task


@pytest.fixture(scope="module")
def killed(make_task: MakeTask, forked_ranks: ForkedRanks) -> StageTask:
    """The same run, killed while it saved for the second time."""
    task = make_task(train_settings(steps=6, checkpoint_every_steps=2))
    assert forked_ranks.work(task, die_at_file_event=FILE_EVENTS_PER_SAVE + FIRST_INSIDE).wait() == {0: -signal.SIGKILL}
    return task


@pytest.fixture
def cut(killed: StageTask, tmp_path: Path) -> StageTask:
    """A copy of ``killed``."""
    return replace(killed, out=Path(shutil.copytree(killed.out, tmp_path / "out")))


def test_a_full_disk_is_reported_and_no_saved_state_is_lost(
    straight: StageTask, cut: StageTask, forked_ranks: ForkedRanks
):
    before = saved_step(cut)
    assert before > 0
    assert forked_ranks.work(cut, limits={"RLIMIT_FSIZE": 50_000}).wait() == {0: 1}
    outcome = read_json(cut.out / "logs" / OUTCOME_FILE)
    assert outcome["explained"] and f"the checkpoint of step {before + 2} could not be saved" in outcome["cause"]
    assert "Free some space and repeat the same command" in outcome["cause"]
    assert saved_step(cut) == before
    assert forked_ranks.work(cut).wait() == {0: 0}
    assert logged(cut, "loss") == logged(straight, "loss")


def test_training_that_continues_does_not_change_the_checkpoint_being_written(
    make_task: MakeTask, forked_ranks: ForkedRanks, tmp_path: Path
):
    """The oracle is a run that ends after the same step, whose state nothing can change any more."""
    settings = train_settings(steps=6, checkpoint_every_steps=2, keep_checkpoints=3, evaluate_at=[])
    stopped, slow = make_task(settings, RANKS), make_task(settings, RANKS)
    forked_ranks.run_plan(RANKS, [{"task": task_to_json(stopped), "stop_after": 2}], tmp_path)
    assert set(forked_ranks.work(slow, slow_checkpoints=0.2).wait().values()) == {0}
    ours, theirs = (checkpoint.Checkpoint(task.out / CHECKPOINTS / "step-00000002") for task in (slow, stopped))
    assert ours.fault() is None
    assert ours.content()["shards"] == theirs.content()["shards"]  # the hashes of both ranks' files
    assert ours.content()["tensors"] == theirs.content()["tensors"]
    progress = [found.content()["progress"] for found in (ours, theirs)]
    assert progress[0].keys() == progress[1].keys()
    assert all(progress[0][name] == progress[1][name] for name in progress[0] if "seconds" not in name)
    seconds = read_json(slow.out / TRAINING_FILE)["checkpoints"]
    assert seconds["seconds"] > 3 * 5 * 0.2 and seconds["saved"] == 3


def test_a_stop_request_while_a_checkpoint_is_written_ends_with_a_complete_one(
    make_task: MakeTask, forked_ranks: ForkedRanks
):
    task = make_task(train_settings(steps=200, checkpoint_every_steps=2), RANKS)
    launch = forked_ranks.work(task, slow_checkpoints=0.1)
    partial = task.out / CHECKPOINTS / "step-00000002.partial"
    while not partial.exists() or last_step(task) <= 2:
        time.sleep(0.001)
    assert partial.exists()
    launch.kill(1, signal.SIGTERM)
    assert set(launch.wait().values()) == {0}
    assert read_json(task.out / LOGS / OUTCOME_FILE) == {"status": "stopped"}
    assert saved_step(task) == last_step(task)
    assert not list((task.out / CHECKPOINTS).glob("*.partial"))


def test_a_rank_that_cannot_write_its_part_ends_the_job_with_the_reason(make_task: MakeTask, forked_ranks: ForkedRanks):
    task = make_task(train_settings(steps=6, checkpoint_every_steps=2), RANKS)
    limits = {"RLIMIT_FSIZE": 50_000}
    assert forked_ranks.work(task, limits=limits, limited_rank=1, grace=2.0).wait()[1] == 1
    outcome = read_json(task.out / LOGS / OUTCOME_FILE)
    assert outcome["rank"] == 1 and outcome["explained"]
    assert "the checkpoint of step 2 could not be saved" in outcome["cause"] and "Free some space" in outcome["cause"]
    assert saved_step(task) == 0
    assert set(forked_ranks.work(task).wait().values()) == {0}


def test_a_disk_that_is_full_while_logging_is_reported(make_task: MakeTask, forked_ranks: ForkedRanks):
    task = make_task(train_settings(steps=60))
    assert forked_ranks.work(task, limits={"RLIMIT_FSIZE": 16_000}).wait() == {0: EXIT_REQUEST}
    assert 0 < last_step(task) < 60 and saved_step(task) == 0
    outcome = read_json(task.out / "logs" / OUTCOME_FILE)
    assert (outcome["status"], outcome["setting"]) == ("refused", "output_dir")
    assert "more bytes are needed there" in outcome["rule"] and "Free some space" in outcome["remedy"]
    assert forked_ranks.work(task).wait() == {0: 0}


def test_resuming_is_refused_if_frozen_base_weights_changed(
    make_task: MakeTask, forked_ranks: ForkedRanks, tmp_path: Path
):
    task = make_task(train_settings(steps=6, checkpoint_every_steps=2))
    model = Path(shutil.copytree(task.parents["model"], tmp_path / "model"))
    task = replace(task, parents={**task.parents, "model": model})
    forked_ranks.work(task, die_at_file_event=FILE_EVENTS_PER_SAVE + FIRST_INSIDE).wait()
    assert saved_step(task) > 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1.0  # frozen
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert forked_ranks.work(task).wait() == {0: 2}
    outcome = read_json(task.out / "logs" / OUTCOME_FILE)
    assert outcome["status"] == "refused" and "the model's files" in outcome["rule"]


def test_a_damaged_checkpoint_is_reported_and_training_resumes_from_the_one_before_it(
    make_task: MakeTask, forked_ranks: ForkedRanks
):
    settings = train_settings(steps=8, checkpoint_every_steps=2)
    straight, damaged = make_task(settings), make_task(settings)
    forked_ranks.work(straight).wait()
    forked_ranks.work(damaged, die_at_file_event=2 * FILE_EVENTS_PER_SAVE + FIRST_INSIDE).wait()
    newest = saved_step(damaged)
    state = damaged.out / CHECKPOINTS / checkpoint.directory_name(newest) / checkpoint.STATE_FILE
    state.write_text(state.read_text()[:-100])
    assert 0 < saved_step(damaged) < newest
    assert forked_ranks.work(damaged).wait() == {0: 0}
    start = read_json(damaged.out / "logs" / START_FILE)
    assert start["resumed_after"] < newest and f"{state.parent} cannot be used" in start["notes"][0]
    assert logged(damaged, "loss") == logged(straight, "loss")


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "removed"])
def test_a_damaged_log_is_restored_from_the_checkpoint(
    straight: StageTask, cut: StageTask, forked_ranks: ForkedRanks, damage: str
):
    log = cut.out / "metrics.jsonl"
    content = bytearray(log.read_bytes())
    digit = content.index(b'"loss": ') + len(b'"loss": ')
    if damage == "flipped bit":
        content[digit] ^= 1  # another digit
    log.write_bytes(content[:digit] if damage == "truncated" else content)
    if damage == "removed":
        log.unlink()
    assert saved_step(cut) > 0
    assert forked_ranks.work(cut).wait() == {0: 0}
    for name in COMPARED:
        assert logged(cut, name) == logged(straight, name), name
    assert f"{log} is damaged and is restored from" in rank_log(cut.out / "logs", 0).read_text()


def test_a_damaged_snapshot_is_refused_on_resuming(make_task: MakeTask, forked_ranks: ForkedRanks):
    task = make_task(train_settings(steps=6, checkpoint_every_steps=2, snapshot_at=[0.2]), RANKS)
    forked_ranks.work(task, die_at_file_event=FILE_EVENTS_PER_SAVE + FIRST_INSIDE).wait()
    assert saved_step(task) > 0
    weights = task.out / "on_the_way" / "20" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert forked_ranks.work(task).wait() == {0: EXIT_REQUEST, 1: EXIT_REQUEST}
    outcome = read_json(task.out / "logs" / OUTCOME_FILE)
    assert outcome["setting"] == "pretrain.snapshot_at" and f"{weights.parent} is damaged" in outcome["rule"]
    assert "force=[pretrain]" in outcome["remedy"]
    weights.write_bytes(content)
    assert forked_ranks.work(task).wait() == {0: 0, 1: 0}


def test_a_checkpoint_of_an_earlier_version_has_no_log_and_is_resumed(
    straight: StageTask, cut: StageTask, forked_ranks: ForkedRanks
):
    (saved,) = (cut.out / CHECKPOINTS).glob("step-????????")
    state = {key: value for key, value in read_json(saved / "state.json").items() if key not in ("files", "sha256")}
    write_json(saved / "state.json", {**state, "sha256": sha256_json(state)})
    (saved / "metrics.jsonl").unlink()
    assert forked_ranks.work(cut).wait() == {0: 0}
    assert read_json(cut.out / "logs" / START_FILE)["resumed_after"] > 0
    assert logged(cut, "loss") == logged(straight, "loss")


def test_a_non_finite_loss_ends_training_and_keeps_the_last_good_checkpoint(
    make_task: MakeTask, forked_ranks: ForkedRanks
):
    task = make_task(train_settings(learning_rate=1e30, warmup_fraction=0.0, checkpoint_every_steps=1))
    assert forked_ranks.work(task).wait() == {0: 1}
    cause = read_json(task.out / "logs" / OUTCOME_FILE)["cause"]
    assert "is nan at step 2" in cause and "Lower pretrain.learning_rate" in cause
    assert not (task.out / TRAINING_FILE).exists()
    found = checkpoint.newest(task.out / CHECKPOINTS, pytest.fail)
    assert found is not None and found.step == 1
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors().values())
