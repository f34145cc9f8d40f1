from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soju.core.errors import IntegrityError, UserError
from soju.translation.step_account import StepAccount


def run_to(account, clock, *, every=1_000):
    """Execute up to this clock with a checkpoint each thousand steps."""
    while account.executed < clock:
        account.step(account.executed + 1)
        if account.executed % every == 0:
            account.checkpoint()


def test_a_rollback_keeps_the_clock_and_undoes_the_steps_since_the_best():
    account = StepAccount(10_000)
    run_to(account, 4_000)
    undone = account.roll_back(2_000)
    assert (undone.clock, undone.back_to, undone.kept_there, undone.abandoned) == (4_000, 2_000, 2_000, (3_000, 4_000))
    assert account.checkpoints == {0: 0, 1_000: 1_000, 2_000: 2_000, 4_000: 2_000}
    assert (account.executed, account.kept, account.undone, account.left) == (4_000, 2_000, 2_000, 6_000)
    run_to(account, 10_000)
    assert account.closed
    assert account.summary() == {
        "total": 10_000,
        "executed": 10_000,
        "kept": 8_000,
        "undone": 2_000,
        "refused": 0,
        "rollbacks": 1,
        "left": 0,
    }


def test_a_second_rollback_counts_from_the_weights_of_the_first():
    account = StepAccount(100)
    run_to(account, 30, every=10)
    account.roll_back(10)  # weights of 10 at clock 30
    run_to(account, 50, every=10)
    assert account.checkpoints[40] == 20
    undone = account.roll_back(40)
    assert (undone.kept_there, undone.abandoned) == (20, (50,))
    assert (account.kept, account.undone) == (20, 30)


def test_back_to_the_untrained_student_keeps_nothing():
    account = StepAccount(10)
    run_to(account, 4)
    account.roll_back(0)
    assert (account.kept, account.undone) == (0, 4)


def test_refused_steps_are_executed_and_on_the_way():
    account = StepAccount(3)
    account.step(1)
    account.step(2, refused=True)
    assert (account.refused, account.executed, account.kept) == ([2], 2, 2)


def test_no_step_is_executed_twice_left_out_or_one_too_many():
    account = StepAccount(2)
    account.step(1)
    for clock in (1, 3):
        with pytest.raises(UserError, match="execute each step once, in order"):
            account.step(clock)
    account.step(2)
    with pytest.raises(UserError, match="step 3 is one too many"):
        account.step(3)


def test_only_checkpoints_that_are_there_can_be_gone_back_to():
    account = StepAccount(100)
    run_to(account, 30, every=10)
    account.forget(10)
    for clock in (10, 15, 40):
        with pytest.raises(UserError, match="there are 0, 20, 30"):
            account.roll_back(clock)
    with pytest.raises(UserError, match="no checkpoint 10"):
        account.forget(10)
    with pytest.raises(UserError, match="give at least 1"):
        StepAccount(0)


@st.composite
def stories(draw):
    """Any order of steps, checkpoints, removals and rollbacks, with the weights as a list of executed steps beside."""
    account = StepAccount(draw(st.integers(1, 40)))
    weights, saved = [], {0: []}
    for action in draw(
        st.lists(st.sampled_from(["step", "step", "step", "refuse", "save", "forget", "back"]), max_size=60)
    ):
        if action in ("step", "refuse") and not account.closed:
            account.step(account.executed + 1, refused=action == "refuse")
            weights = [*weights, account.executed]
        elif action == "save":
            account.checkpoint()
            saved[account.executed] = weights
        elif action == "forget" and len(saved) > 1:
            clock = draw(st.sampled_from(sorted(saved)))
            account.forget(clock)
            del saved[clock]
        elif action == "back":
            clock = draw(st.sampled_from(sorted(saved)))
            account.roll_back(clock)
            weights = saved[clock]
            saved = {c: w for c, w in saved.items() if c <= clock} | {account.executed: weights}
    return account, weights, saved


@given(stories())
def test_the_account_is_that_of_the_weights_themselves(story):
    account, weights, saved = story
    assert account.kept == len(weights)
    assert account.kept + account.undone == account.executed
    assert account.executed + account.left == account.total
    assert account.checkpoints == {clock: len(steps) for clock, steps in saved.items()}


@given(stories())
def test_any_account_survives_its_file(story):
    account = story[0]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "account.json"
        account.save(path)
        assert StepAccount.load(path) == account
        assert [entry.name for entry in Path(folder).iterdir()] == ["account.json"]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("kept",), 11),
        (("format",), "other"),
        (("account", "executed"), 31),
        (("account", "executed"), "30"),
        (("account", "checkpoints", "20"), 20),  # was abandoned
        (("account", "checkpoints", "30"), 30),  # holds the weights of 10
        (("account", "checkpoints", "40"), 20),
        (("account", "rollbacks", 0, "kept_there"), 5),
        (("account", "rollbacks", 0, "back_to"), 31),
        (("account", "refused"), [True]),
        (("account", "refused"), [40]),
        (("account", "refused"), [3, 3]),
        (("account", "rollbacks"), None),
        (("account", "total"), -1),
    ],
)
def test_an_account_that_does_not_add_up_is_refused(tmp_path, place, wrong):
    account = StepAccount(100)
    run_to(account, 30, every=10)
    account.roll_back(10)
    path = tmp_path / "account.json"
    account.save(path)
    value = target = json.loads(path.read_text())
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = wrong
    path.write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match=r"no step account .*resume from an older checkpoint"):
        StepAccount.load(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', "[" * 100_000, "null"])
def test_what_is_no_account_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(IntegrityError, match="no step account"):
        StepAccount.load(tmp_path / "a.json")
    with pytest.raises(IntegrityError, match="no step account"):
        StepAccount.load(tmp_path / "absent.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(IntegrityError, match="not a regular file"):
        StepAccount.load(tmp_path / "link.json")
