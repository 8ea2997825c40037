import math
from fractions import Fraction
from itertools import pairwise

import pytest

from pipeline.training.schedule import evaluation_steps, fractions_at, learning_rate, total_steps
from tests.training.small import train_settings

STEPS = 100


def rates(**changes) -> list[float]:
    train = train_settings(learning_rate=1.0, warmup_fraction=0.1, final_learning_rate_fraction=0.1, **changes)
    return [learning_rate(train, step, STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_the_warm_up_is_linear(schedule: str):
    warm = rates(schedule=schedule)[:10]
    assert warm == pytest.approx([0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("schedule, last", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_decay_ends_with_the_final_fraction_and_never_rises(schedule: str, last: float):
    after = rates(schedule=schedule)[9:]
    assert after[-1] == pytest.approx(last)
    assert all(later <= earlier for earlier, later in pairwise(after))


def naive(schedule: str, step: int) -> float:
    """An independent implementation: ten steps of warm-up to 1, then decay to 0.1 at step 100."""
    if step <= 10:
        return step / 10
    share = (step - 10) / 90
    return {
        "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * share)),
        "linear": 1.0 - 0.9 * share,
        "constant": 1.0,
        "warmup_stable_decay": 1.0 if step <= 80 else 1.0 - 0.9 * (step - 80) / 20,
    }[schedule]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_every_step_has_the_rate_of_an_independent_implementation(schedule: str):
    expected = [naive(schedule, step) for step in range(1, STEPS + 1)]
    assert rates(schedule=schedule, decay_fraction=0.2) == pytest.approx(expected, rel=1e-12)


def test_cosine_is_halfway_in_the_middle():
    assert rates(schedule="cosine")[54] == pytest.approx(0.55)  # step 55 is the middle of 10 to 100


def test_warmup_stable_decay_stays_at_the_peak_and_then_decays():
    all_rates = rates(schedule="warmup_stable_decay", decay_fraction=0.2)
    assert all_rates[9:80] == [1.0] * 71
    assert all_rates[89] == pytest.approx(0.55)
    assert all_rates[99] == pytest.approx(0.1)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    train = train_settings(learning_rate=1.0, warmup_fraction=0.0, schedule="constant")
    assert learning_rate(train, 1, 1) == 1.0


@pytest.mark.parametrize("epochs, steps", [(1.0, 12), (2.0, 25), (0.5, 6), (0.01, 1)])
def test_epochs_are_converted_to_full_global_batches(epochs: float, steps: int):
    assert total_steps(train_settings(steps=None, epochs=epochs, global_batch=8), blocks=101) == steps


@pytest.mark.parametrize(
    "epochs, blocks, batch, corpus, steps",
    [(0.29, 100, 1, 0.0, 29), (1.15, 100, 1, 0.0, 115), (1.0, 30, 10, 0.7, 10), (0.999, 100, 1, 0.0, 99)],
)
def test_rounding_takes_no_step_from_an_integer(epochs: float, blocks: int, batch: int, corpus: float, steps: int):
    """Exact: epochs · blocks / (batch · (1 - corpus)), rounded down."""
    train = train_settings(steps=None, epochs=epochs, global_batch=batch, corpus_fraction=corpus)
    exact = Fraction(str(epochs)) * blocks / (batch * (1 - Fraction(str(corpus))))
    assert total_steps(train, blocks) == math.floor(exact) == steps


def test_blocks_of_the_corpus_do_not_count_in_epochs():
    train = train_settings(steps=None, epochs=2.0, global_batch=8, corpus_fraction=0.5)
    assert total_steps(train, blocks=100) == 50


def test_evaluation_fractions_are_converted_to_steps():
    train = train_settings(evaluate_at=[0.0, 0.2, 0.5, 1.0])
    assert evaluation_steps(train, 20) == {0: 0.0, 4: 0.2, 10: 0.5, 20: 1.0}
    assert evaluation_steps(train, 2) == {0: 0.0, 1: 0.5, 2: 1.0}  # nothing is trained after 0.2 of two steps
    assert evaluation_steps(train, 1) == {0: 0.0, 1: 1.0}


def test_several_fractions_may_round_to_one_step():
    assert fractions_at([0.2, 0.4, 1.0], 1, steps=3) == [0.2, 0.4]
    assert fractions_at([0.2, 0.4, 1.0], 2, steps=3) == []
