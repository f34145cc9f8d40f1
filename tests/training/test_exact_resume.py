"""A run that was interrupted and resumed ends in the same bits as one that was not."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, EarlyStoppingCallback, TrainerCallback

from soju.core.errors import IntegrityError, StoppedError, UserError
from soju.training.checkpoints import list_checkpoints
from training.pico_trainers import TRAINERS, plain_trainer, sparse_trainer, weights


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Signal(TrainerCallback):
    """Sends a signal at a step: before its first micro-batch, between two, or at its end."""

    def __init__(self, step, event="on_step_end", number=signal.SIGTERM):
        def send(args, state, control, **kwargs):
            if state.global_step + (event != "on_step_end") == step:
                os.kill(os.getpid(), number)

        setattr(self, event, send)


def disturb():
    """Whatever ran in this process before must not matter."""
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)


def finish(kind, folder, **settings):
    disturb()
    trainer = TRAINERS[kind](folder, **settings)
    trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
    return trainer


def stop(kind, folder, callback, **settings):
    disturb()
    trainer = TRAINERS[kind](folder, extra={"callbacks": [callback]}, **settings)
    with pytest.raises(StoppedError) as caught:
        trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
    return caught.value


def assert_same(trainer, expected):
    for name, value in weights(trainer).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    runs = {}
    for kind in TRAINERS:
        folder = tmp_path_factory.mktemp(kind)
        runs[kind] = (folder, weights(finish(kind, folder)))
    return runs


@pytest.mark.parametrize(("kind", "step"), [("plain", 4), ("plain", 8), ("plain", 12), ("sparse", 8), ("plain", 15)])
def test_resuming_from_any_checkpoint_ends_in_the_same_weights_and_history(straight, tmp_path, kind, step):
    folder, expected = straight[kind]
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(folder / "checkpoints" / f"checkpoint-{step}", tmp_path / "checkpoints" / f"checkpoint-{step}")
    shutil.copy(folder / "history.jsonl", tmp_path)
    trainer = finish(kind, tmp_path)
    assert_same(trainer, expected)
    assert trainer.state.global_step == 15
    assert (tmp_path / "history.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("step", "event"),
    [(1, "on_step_end"), (3, "on_substep_end"), (5, "on_step_end"), (5, "on_epoch_end"), (7, "on_step_begin")],
)
def test_a_signal_writes_a_checkpoint_at_the_end_of_the_step_and_the_resumed_run_is_the_same(
    straight, tmp_path, step, event
):
    folder, expected = straight["plain"]
    stopped = stop("plain", tmp_path, Signal(step if event != "on_epoch_end" else step + 1, event), num_train_epochs=3)
    reached = step + (event == "on_epoch_end")
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert f"SIGTERM: stopped after step {reached} of 15" in str(stopped)
    assert f"checkpoint-{reached} is written" in str(stopped)
    assert_same(finish("plain", tmp_path), expected)
    assert (tmp_path / "history.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()


def test_ctrl_c_five_times_in_a_row_changes_nothing(straight, tmp_path):
    _, expected = straight["sparse"]
    for step in (2, 3, 6, 10, 14):
        assert stop("sparse", tmp_path, Signal(step, number=signal.SIGINT)).exit_code == 130
    assert_same(finish("sparse", tmp_path), expected)


def test_evaluating_and_saving_more_often_does_not_change_the_weights(straight, tmp_path):
    _, expected = straight["plain"]
    assert_same(
        finish("plain", tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1), expected
    )


def test_an_epoch_evaluation_is_not_lost_when_the_run_stops_at_the_last_step_of_the_epoch(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2, "logging_steps": 50}
    straight_run, stopped_run = tmp_path / "straight", tmp_path / "stopped"
    expected = weights(finish("plain", straight_run, **settings))
    stop("plain", stopped_run, Signal(5), **settings)
    assert_same(finish("plain", stopped_run, **settings), expected)
    history = (stopped_run / "history.jsonl").read_text()
    assert history == (straight_run / "history.jsonl").read_text()
    assert history.count("eval_loss") == 2


def test_a_stop_in_the_middle_of_an_epoch_adds_no_evaluation(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1}
    stop("plain", tmp_path, Signal(3), **settings)
    assert "eval_loss" not in (tmp_path / "history.jsonl").read_text()


def test_workers_that_collate_ahead_change_nothing(straight, tmp_path):
    _, expected = straight["plain"]
    stop("plain", tmp_path, Signal(7, number=signal.SIGINT), dataloader_num_workers=1)
    assert_same(finish("plain", tmp_path, dataloader_num_workers=1), expected)


def test_patience_goes_on_where_it_was(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
        "learning_rate": 1e-12,
        "num_train_epochs": 9,
    }

    def train(folder, *callbacks):
        trainer = plain_trainer(folder, extra={"callbacks": [EarlyStoppingCallback(3, 0.5), *callbacks]}, **settings)
        trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
        return trainer.state.global_step

    with pytest.raises(StoppedError):
        train(tmp_path / "stopped", Signal(5))
    assert train(tmp_path / "stopped") == train(tmp_path / "straight") == 8


class Counter:
    """What a controller keeps: a number and a tensor."""

    def __init__(self):
        self.value, self.vector = 0.1, torch.zeros(2)

    def state_dict(self):
        return {"value": self.value, "vector": self.vector}

    def load_state_dict(self, state):
        self.value, self.vector = state["value"], state["vector"]


class Count(TrainerCallback):
    def __init__(self, counter):
        self.counter = counter

    def on_step_end(self, args, state, control, **kwargs):
        self.counter.value *= 1.1
        self.counter.vector += 0.1


def test_state_of_the_recipe_is_restored(tmp_path):
    def train(folder, *callbacks):
        counter = Counter()
        extra = {"extra_state": {"controller": counter}, "callbacks": [Count(counter), *callbacks]}
        trainer = plain_trainer(folder, extra=extra, num_train_epochs=1)
        trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
        return counter

    expected = train(tmp_path / "straight")
    with pytest.raises(StoppedError):
        train(tmp_path / "stopped", Signal(3))
    resumed = train(tmp_path / "stopped")
    assert resumed.value == expected.value
    assert torch.equal(resumed.vector, expected.vector)
    with pytest.raises(UserError, match=r"holds the state of .*recipe.controller"):
        finish("plain", tmp_path / "stopped", num_train_epochs=2)


def test_a_moved_run_folder_still_knows_its_best_checkpoint(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "eval_loss"}
    stop("plain", tmp_path / "here", Signal(9), **settings)
    shutil.move(tmp_path / "here", tmp_path / "there")
    trainer = finish("plain", tmp_path / "there", **settings)
    assert trainer.state.best_model_checkpoint.startswith(str(tmp_path / "there"))


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    stop("plain", tmp_path, Signal(3))
    with pytest.raises(UserError, match=r"trained with per_device_train_batch_size 4 \(now 2\)"):
        finish("plain", tmp_path, per_device_train_batch_size=2)


def test_a_new_run_over_old_checkpoints_is_refused(tmp_path):
    stop("plain", tmp_path, Signal(3))
    with pytest.raises(UserError, match="holds checkpoints already"):
        plain_trainer(tmp_path).train()


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
    stop("plain", tmp_path, Signal(3))
    path = tmp_path / "checkpoints" / "checkpoint-3"
    (path / "optimizer.pt").write_bytes((path / "optimizer.pt").read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"optimizer\.pt"):
        plain_trainer(tmp_path).train(path)


def test_nothing_to_resume_from_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume from; train without --resume"):
        plain_trainer(tmp_path).train(True)


def test_going_back_to_an_earlier_checkpoint_puts_later_ones_aside_and_cuts_the_history(straight, tmp_path):
    folder, expected = straight["plain"]
    shutil.copytree(folder, tmp_path / "run")
    trainer = plain_trainer(tmp_path / "run")
    trainer.train(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    assert_same(trainer, expected)
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()
    assert (tmp_path / "run" / "checkpoints" / "abandoned-checkpoint-15").is_dir()


@pytest.mark.parametrize(
    "name", ["enable_jit_checkpoint", "save_only_model", "ignore_data_skip", "auto_find_batch_size"]
)
def test_arguments_that_break_exactness_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: "):
        plain_trainer(tmp_path, **{name: True})


def test_checkpoints_hold_no_pickled_arguments_and_load_without_us(straight):
    for folder, _ in straight.values():
        path = folder / "checkpoints" / "checkpoint-15"
        assert (path / "training_args.json").is_file()
        for file in path.glob("*.pt*"):
            with torch.serialization.safe_globals(
                [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]
            ):
                torch.load(file, weights_only=True)
        assert not list(path.glob("*.bin"))


def test_a_loss_parameter_of_its_own_is_resumed(straight, tmp_path):
    _, expected = straight["sparse"]
    stop("sparse", tmp_path, Signal(6))
    trainer = sparse_trainer(tmp_path)
    trainer.train(True)
    assert expected["temperature"] != 0.5
    assert torch.equal(trainer.loss.temperature.detach(), expected["temperature"])


def test_a_checkpoint_at_the_end_of_an_epoch_holds_the_evaluation_of_that_epoch(tmp_path):
    settings = {"eval_strategy": "epoch", "save_steps": 5, "num_train_epochs": 2, "metric_for_best_model": "eval_loss"}
    finish("plain", tmp_path, **settings)
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 5
    assert "eval_loss" in state["log_history"][-1]


def test_a_model_that_draws_random_numbers_while_it_is_saved_changes_nothing(straight, tmp_path, monkeypatch):
    _, expected = straight["plain"]
    save = BertForMaskedLM.save_pretrained

    def draw(self, *args, **kwargs):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return save(self, *args, **kwargs)

    monkeypatch.setattr(BertForMaskedLM, "save_pretrained", draw)
    stop("plain", tmp_path, Signal(7), save_steps=1)
    assert_same(finish("plain", tmp_path), expected)


def test_masks_differ_from_epoch_to_epoch(tmp_path):
    trainer = finish("plain", tmp_path, num_train_epochs=2)
    rows = [trainer.train_dataset[0]]
    last = trainer._collator(rows)["input_ids"]
    seen = []
    for epoch in range(8):
        trainer._collator.set_epoch(epoch)
        seen.append(trainer._collator(rows)["input_ids"].tolist())
    assert seen[1] == last.tolist()  # the trainer had told it of epoch 1
    assert len({str(ids) for ids in seen}) > 1
