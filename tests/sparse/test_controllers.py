"""The controller finds the weight that gives the number of terms asked for; the alarm rings."""

import math

import pytest
import torch

from soju.core.errors import RegressionError
from soju.sparse.curriculum import SparsityAlarm, SparsityController


def observed(controller, active, texts=4):
    controller.observe(torch.full((texts,), float(active)))
    controller.step()


def test_one_step_by_hand():
    controller = SparsityController(10, weight=1.0, rate=0.1, tolerance=1.0, damping=0.5, smoothing=0.5)
    observed(controller, 20)
    assert controller.active == pytest.approx(20)
    error = math.log(2)
    assert controller.weight == pytest.approx(math.exp(0.1 * error) * math.exp(0.5 * error))
    observed(controller, 5)  # mean (0.5 * 0.5 * 20 + 0.5 * 5) / 0.75
    assert controller.active == pytest.approx(10.0)
    assert controller.weight == pytest.approx(math.exp(0.1 * error))


def test_beyond_the_tolerance_the_multiplier_moves_at_the_full_rate():
    for active, error in ((10.5, math.log(1.05) / 0.1), (30, 1.0), (3, -1.0)):
        controller = SparsityController(10, weight=1.0, rate=0.2, tolerance=0.1, damping=0.0)
        observed(controller, active)
        assert controller.weight == pytest.approx(math.exp(0.2 * error))


def test_the_weight_is_bounded():
    controller = SparsityController(1, weight=1.0, rate=0.5, damping=0.0, smoothing=0.0, bounds=(0.1, 2.0))
    observed(controller, 10_000)
    assert controller.weight == pytest.approx(math.exp(0.5))
    observed(controller, 10_000)
    assert controller.weight == 2.0
    for _ in range(50):
        observed(controller, 0)
    assert controller.weight == 0.1


def test_it_settles_where_texts_are_as_asked_within_a_tenth():
    # active terms answer to the weight as 400 / (1 + 30 weight), with a lag
    controller = SparsityController(80, weight=0.003, rate=0.05)
    active = 400.0
    for _ in range(600):
        active += 0.2 * (400 / (1 + 30 * controller.weight) - active)
        observed(controller, active)
    assert active == pytest.approx(80, rel=0.1)


def test_micro_batches_of_a_step_count_by_their_texts():
    controller = SparsityController(None, weight=1.0)
    controller.observe(torch.tensor([10.0]))
    controller.observe(torch.tensor([20.0, 30.0, 40.0]))
    controller.step()
    assert controller.active == pytest.approx(25)


def test_without_a_wish_or_before_the_penalty_starts_the_weight_stays():
    free = SparsityController(None, weight=0.5)
    observed(free, 1000)
    waiting = SparsityController(10, weight=0.5)
    waiting.observe(torch.tensor([1000.0]))
    waiting.step(move=False)
    assert free.weight == waiting.weight == 0.5
    assert waiting.active == pytest.approx(1000)


def test_its_state_is_all_it_needs_to_go_on():
    straight, resumed = (SparsityController(10, weight=1.0) for _ in range(2))
    for active in (30, 20):
        observed(straight, active)
    resumed.load_state_dict(straight.state_dict())
    for controller in (straight, resumed):
        observed(controller, 15)
    assert straight.weight == resumed.weight
    assert straight.active == resumed.active


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 0},
        {"weight": 0.0},
        {"rate": 0.0},
        {"tolerance": 0.0},
        {"damping": -1.0},
        {"smoothing": 1.0},
        {"bounds": (2.0, 1.0)},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        SparsityController(**{"target": 10, "weight": 1.0, **wrong})


def test_the_alarm_names_collapse_and_rings_when_it_lasts():
    alarm = SparsityAlarm(1000, patience=3)
    assert alarm.look(50, step=1) is None
    assert "collapse" in alarm.look(0.2, step=2)
    assert alarm.look(50, step=3) is None
    for step in (4, 5):
        alarm.look(0.2, step=step)
    with pytest.raises(RegressionError, match="step 6: collapse"):
        alarm.look(0.2, step=6)


def test_the_alarm_names_vectors_that_are_all_dense_but_not_in_its_grace():
    alarm = SparsityAlarm(10_000, grace=10)
    assert alarm.look(9000, step=5) is None
    assert "all dense: 9,000 of 10,000" in alarm.look(9000, step=10)
    assert SparsityAlarm(100).look(90, step=10) is None  # few terms in all


def test_the_alarm_counts_on_after_a_resume():
    first, second = SparsityAlarm(1000, patience=2), SparsityAlarm(1000, patience=2)
    first.look(0, step=1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(RegressionError):
        second.look(0, step=2)
