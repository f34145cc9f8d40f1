"""Costs, expected speed and the choice of the block length."""

import json
import random

import pytest
from pico_models import pair

from soju.core.errors import IntegrityError, UserError
from soju.speculative_kd.cache import Reader
from soju.speculative_kd.config import RolloutSettings
from soju.speculative_kd.controller import (
    Costs,
    GammaController,
    best_gamma,
    expected_speed,
    expected_tokens,
    measure_costs,
)

# A long pass of the teacher costs what a short one does: the published assumption.
FREE = Costs(rows=1, student=0.125, blocks=((1, 1.0),), teacher_seconds=1.0)


def test_expected_tokens_by_hand():
    assert expected_tokens(0.5, 1) == 1
    assert expected_tokens(0.5, 2) == 1.5
    assert expected_tokens(0.0, 9) == 1
    assert expected_tokens(1.0, 9) == 9


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 4), (0.7, 5), (0.9, 20)])
def test_expected_tokens_by_trial(alpha, gamma):
    chance = random.Random(0)

    def block():
        run = next((place for place in range(gamma) if chance.random() >= alpha), gamma)
        return min(run + 1, gamma)  # the replacement; none behind a whole block

    trials = 20_000
    assert sum(block() for _ in range(trials)) / trials == pytest.approx(expected_tokens(alpha, gamma), rel=0.03)


@pytest.mark.parametrize(
    ("alpha", "best", "speed", "speed_of_20"), [(0.7, 5, 1.71, 0.95), (0.8, 6, 2.11, 1.41), (0.9, 10, 2.89, 2.51)]
)
def test_the_best_block_at_a_cost_of_an_eighth(alpha, best, speed, speed_of_20):
    assert best_gamma(alpha, FREE, 32) == best
    assert expected_speed(alpha, best, FREE) == pytest.approx(speed, abs=0.005)
    assert expected_speed(alpha, 20, FREE) == pytest.approx(speed_of_20, abs=0.005)


def test_the_choice_is_the_best_of_all_lengths():
    chance = random.Random(1)
    for _ in range(200):
        blocks = ((1, 1.0), (5, 1 + chance.random()), (20, 2 + 5 * chance.random()))
        costs = Costs(rows=1, student=chance.uniform(0.01, 1.2), blocks=blocks, teacher_seconds=1)
        alpha, longest = chance.random(), chance.randint(1, 40)
        speeds = [expected_speed(alpha, gamma, costs) for gamma in range(1, longest + 1)]
        assert speeds[best_gamma(alpha, costs, longest) - 1] == max(speeds)


def test_a_student_as_dear_as_its_teacher_proposes_one_token():
    assert best_gamma(0.7, Costs(rows=1, student=1, blocks=((1, 1), (4, 2.2)), teacher_seconds=1), 20) == 1


def test_costs_between_measured_lengths_are_linear():
    costs = Costs(rows=1, student=0.2, blocks=((1, 1.0), (4, 1.6), (8, 3.6)), teacher_seconds=1)
    assert [costs.block(gamma) for gamma in (1, 2, 4, 6, 8, 10)] == pytest.approx([1.0, 1.2, 1.6, 2.6, 3.6, 4.6])


@pytest.mark.parametrize("blocks", [(), ((2, 1.0),), ((1, 1.0), (1, 2.0)), ((1, 1.0), (4, 2.0), (2, 1.0)), ((1, 0.0),)])
def test_costs_without_order_or_beginning_are_refused(blocks):
    with pytest.raises(ValueError, match="validation error"):
        Costs(rows=1, student=0.2, blocks=blocks, teacher_seconds=1)


def test_costs_are_written_and_read(tmp_path):
    costs = Costs(rows=7, student=0.1234567890123456789, blocks=((1, 1.0), (2, 1 / 3)), teacher_seconds=2e-3)
    costs.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == costs
    assert json.loads((tmp_path / "costs.json").read_text())["rows"] == 7
    with pytest.raises(IntegrityError, match=r"none\.json: No such file"):
        Costs.read(tmp_path / "none.json")


def test_measured_costs_rise_with_the_block():
    student, teacher = pair(0.8)
    costs = measure_costs(
        Reader(student, "student"),
        Reader(teacher, "teacher"),
        RolloutSettings(gamma=512),
        rows=4,
        context=8,
        repetitions=3,
    )
    assert [length for length, _ in costs.blocks] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert costs.block(1) == 1
    assert costs.block(512) > 2
    assert costs.teacher_seconds > 0


def test_acceptance_comes_from_tested_proposals_alone():
    # α = 0.8 in blocks of 20: counting proposals behind a rejection as rejected would give 0.2.
    chance = random.Random(0)
    controller = GammaController(FREE, 32)
    accepted = proposed = 0
    for _ in range(2000):
        run = next((place for place in range(20) if chance.random() >= 0.8), 20)
        controller.observe(min(run + 1, 20), run)
        accepted, proposed = accepted + run, proposed + 20
    assert controller.alpha == pytest.approx(0.8, abs=0.03)
    assert accepted / proposed < 0.25
    assert controller.gamma() == best_gamma(controller.alpha, FREE, 32)


def test_acceptance_follows_a_student_that_learns():
    controller = GammaController(FREE, 32)
    for _ in range(1000):
        controller.observe(10, 3)
    assert controller.alpha == pytest.approx(0.3, abs=0.01)
    short = controller.gamma()
    for _ in range(1000):
        controller.observe(10, 9)
    assert controller.alpha == pytest.approx(0.9, abs=0.01)
    assert controller.gamma() > short


def test_it_begins_from_one_half_and_stays_within_the_longest():
    controller = GammaController(FREE, 4)
    assert controller.alpha == 0.5
    controller.observe(10_000, 10_000)
    assert controller.gamma() == 4


def test_its_state_goes_through_json_bit_for_bit():
    controller, other = GammaController(FREE, 20), GammaController(FREE, 20)
    for tested, passed in ((7, 3), (13, 11), (5, 5)):
        controller.observe(tested, passed)
    other.restore(json.loads(json.dumps(controller.state())))
    assert other.state() == controller.state()
    controller.observe(9, 2)
    other.observe(9, 2)
    assert other.alpha == controller.alpha


@pytest.mark.parametrize(
    "state", [{}, {"tested": 3}, {"tested": "x", "passed": 1}, {"tested": 1, "passed": 2}, {"tested": 1, "passed": -1}]
)
def test_broken_states_are_refused(state):
    with pytest.raises(UserError, match=r"controller state: .*; take another checkpoint"):
        GammaController(FREE, 20).restore(state)
