import random

from pipeline.training.loop import DEVIATIONS, LEAST, WINDOW, is_spike


def test_a_loss_far_above_the_steps_before_it_is_a_spike():
    before = [2.0, 3.0] * 20  # mean 2.5, deviation 0.5
    limit = 2.5 + DEVIATIONS * 0.5
    assert not is_spike(limit - 1e-6, before)
    assert is_spike(limit + 1e-6, before)
    assert not is_spike(0.0, before)


def test_too_few_steps_say_nothing():
    assert not is_spike(100.0, [1.0] * (LEAST - 1))
    assert is_spike(100.0, [1.0] * LEAST)


def test_only_the_window_counts():
    assert is_spike(3.0, [50.0, 90.0] * 100 + [1.0] * WINDOW)


def test_noise_is_no_spike():
    noise = random.Random(0)
    losses = [5.0 - step / 1000 + noise.gauss(0, 0.1) for step in range(2000)]
    assert not any(is_spike(loss, losses[:step]) for step, loss in enumerate(losses))
