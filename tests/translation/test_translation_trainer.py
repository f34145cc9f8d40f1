import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico_translation import STUDENT, Scramble, make, training, vocabulary_in
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from soju.core.files import read_json_lines, verify_manifest
from soju.training.checkpoints import list_checkpoints
from soju.translation.config import ClockedTraining
from soju.translation.degradation import DegradationSettings, QualityDegradationDetector
from soju.translation.step_account import StepAccount
from soju.translation.trainer import SupervisedObjective, linear_factor, train_exactly
from soju.translation.vocabulary import collate

PROGRAM = Path(__file__).with_name("pico_translation.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pico")
    vocabulary_in(folder)
    return folder


@pytest.fixture(scope="module")
def broken_run(place):
    """A run of 240 steps whose weights are broken after step 160, so that its third validation regresses."""
    run = training(place / "broken", vocabulary_in(place), callbacks=[Scramble(160)])
    return run, train_exactly(run)


def test_exactly_n_steps_and_the_validations_that_belong_to_them(place):
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    run = training(place / "straight", vocabulary_in(place), callbacks=[Count()])
    # With 24 pairs a model that learns may fall by chance; here nothing is to be undone.
    run.detector = QualityDegradationDetector(DegradationSettings(max_drop=0.99))
    outcome = train_exactly(run)
    assert seen == list(range(1, 241))
    assert [row["clock"] for row in read_json_lines(run.verdicts)] == [0, 60, 120, 180, 240]
    assert (outcome.account.executed, outcome.account.kept, outcome.account.closed) == (240, 240, True)
    assert StepAccount.load(run.folder / "account.json") == outcome.account
    assert len(list((run.folder / "validation").glob("step-*.json"))) == 5
    verify_manifest(outcome.best)


def test_a_finished_run_is_not_trained_again(broken_run, monkeypatch):
    run, outcome = broken_run
    monkeypatch.setattr(run, "make_model", None)  # nothing is made
    assert train_exactly(run).best == outcome.best


def test_a_regression_is_rolled_back_and_the_account_closes(broken_run):
    run, outcome = broken_run
    rows = read_json_lines(run.verdicts)
    assert [row["clock"] for row in rows] == [0, 60, 120, 180, 240]
    assert [row["action"] for row in rows if row["clock"] == 180] == ["roll back"]
    (undone,) = read_json_lines(run.folder / "rollbacks.jsonl")
    assert undone["clock"] == 180
    assert (
        undone["back_to"]
        == max((row for row in rows if row["clock"] < 180), key=lambda row: sum(row["quality"].values()))["clock"]
    )
    summary = outcome.account.summary()
    assert summary["executed"] == 240
    assert summary["kept"] + summary["undone"] == 240
    assert summary["undone"] == 180 - undone["back_to"]


def test_the_rolled_back_checkpoint_has_the_old_weights_and_the_new_clock(place):
    class StopAt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 180:
                raise KeyboardInterrupt

    run = training(place / "published", vocabulary_in(place), callbacks=[Scramble(160), StopAt()])
    with pytest.raises(KeyboardInterrupt):
        train_exactly(run)
    assert [row["clock"] for row in read_json_lines(run.folder / "rollbacks.jsonl")] == [180]
    (undone,) = read_json_lines(run.folder / "rollbacks.jsonl")
    new, old = (run.checkpoints / f"checkpoint-{clock}" for clock in (180, undone["back_to"]))
    verify_manifest(new)
    assert (new / "model.safetensors").samefile(old / "model.safetensors")
    scheduler = torch.load(new / "scheduler.pt", weights_only=True)
    optimiser = torch.load(new / "optimizer.pt", weights_only=True)
    assert scheduler["last_epoch"] == 180
    assert optimiser["param_groups"][0]["lr"] == pytest.approx(1e-2 * (240 - 180) / 230)
    abandoned = [path.name for path in run.checkpoints.glob("abandoned-*")]
    assert abandoned == ([] if undone["back_to"] == 120 else ["abandoned-checkpoint-120"])


def test_the_learning_rate_is_halved_after_a_rollback(broken_run):
    run, _ = broken_run
    rates = {
        row["step"]: row["learning_rate"]
        for row in read_json_lines(run.folder / "history.jsonl")
        if "learning_rate" in row
    }

    assert rates[160] == pytest.approx(1e-2 * (240 - 159) / 230)
    assert rates[200] == pytest.approx(0.5 * 1e-2 * (240 - 199) / 230)


@pytest.mark.parametrize("at", [3, 95, 170, 217])
def test_killed_and_resumed_is_the_straight_run_bit_for_bit(place, broken_run, at):
    straight, _ = broken_run
    folder = place / f"killed-{at}"
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    killed = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(at)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr.decode()
    resumed = training(folder, vocabulary_in(place), callbacks=[Scramble(160)])
    train_exactly(resumed)
    for name in ("account.json", "rollbacks.jsonl"):
        assert (folder / name).read_bytes() == (straight.folder / name).read_bytes()
    last = [list_checkpoints(run.checkpoints)[-1] / "model.safetensors" for run in (straight, resumed)]
    expected, found = (load_file(path) for path in last)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert read_json_lines(resumed.verdicts) == read_json_lines(straight.verdicts)


def test_too_many_rollbacks_stop_the_run_and_keep_the_best(place):
    class Always(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step > 60:
                Scramble(state.global_step).on_step_end(args, state, control, model)

    run = training(place / "hopeless", vocabulary_in(place), steps=480, callbacks=[Always()])
    outcome = train_exactly(run)
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("stopped after 300 of 480 steps")
    assert len(outcome.account.rollbacks) == 3
    assert outcome.best_clock in (0, 60)
    verify_manifest(outcome.best)
    assert train_exactly(run).stopped == outcome.stopped


def test_a_refused_step_is_booked_and_changes_no_weight(place):

    class OnceNan(SupervisedObjective):
        calls = 0

        def __call__(self, model, inputs, positions):
            self.calls += 1
            loss = super().__call__(model, inputs, positions)
            return loss * float("nan") if self.calls == 4 else loss

    run = training(place / "refused", vocabulary_in(place), steps=60, objective=OnceNan(0.1))
    outcome = train_exactly(run)
    assert outcome.account.refused == [4]
    assert outcome.account.executed == 60


def test_accumulated_batches_weigh_every_position_alike(place):
    vocabulary = vocabulary_in(place)
    run = training(place / "unused", vocabulary)
    model, objective = make(STUDENT, vocabulary).eval(), SupervisedObjective(0.1)
    rows = [run.rows[number] for number in range(6)]
    whole, parts = collate(rows), [collate(rows[:2]), collate(rows[2:])]
    positions = float((whole["labels"] != -100).sum())
    together = objective(model, whole, None)
    apart = sum(objective(model, part, positions) for part in parts)
    torch.testing.assert_close(apart, together)
    stock = model(**{name: value for name, value in whole.items() if name != "labels"}).logits
    expected = cross_entropy(stock.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(together, expected)


def test_the_schedule_is_that_of_transformers():
    settings = ClockedTraining(max_steps=50, eval_steps=10, logging_steps=10, warmup_steps=7)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    stock = get_linear_schedule_with_warmup(optimiser, 7, 50)
    for clock in range(50):
        assert stock.get_last_lr()[0] == pytest.approx(linear_factor(clock, settings))
        optimiser.step()
        stock.step()
