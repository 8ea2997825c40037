import random

from pipeline.training.loop import SPIKE_DEVIATIONS, SPIKE_MIN_STEPS, SPIKE_WINDOW, is_spike


def test_a_loss_far_above_the_previous_ones_is_a_spike():
    previous = [2.0, 3.0] * 20  # mean 2.5, deviation 0.5
    limit = 2.5 + SPIKE_DEVIATIONS * 0.5
    assert not is_spike(limit - 1e-6, previous)
    assert is_spike(limit + 1e-6, previous)
    assert not is_spike(0.0, previous)


def test_nothing_is_a_spike_after_too_few_steps():
    assert not is_spike(100.0, [1.0] * (SPIKE_MIN_STEPS - 1))
    assert is_spike(100.0, [1.0] * SPIKE_MIN_STEPS)


def test_losses_before_the_window_do_not_count():
    assert is_spike(3.0, [50.0, 90.0] * 100 + [1.0] * SPIKE_WINDOW)


def test_noise_is_not_a_spike():
    noise = random.Random(0)
    losses = [5.0 - step / 1000 + noise.gauss(0, 0.1) for step in range(2000)]
    assert not any(is_spike(loss, losses[:step]) for step, loss in enumerate(losses))
