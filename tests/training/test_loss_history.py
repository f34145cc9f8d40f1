"""history.jsonl holds unweighted loss components in full precision, once each."""

import json

import pytest
import torch

from soju.training.history import HistoryFile, LossWindow, add_totals
from training.pico_trainers import sparse_trainer


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_terms_are_means_over_micro_batches_and_the_loss_over_steps():
    window = LossWindow()
    window.add(torch.tensor(1.0), {"flops": torch.tensor([1.0, 3.0])})
    window.add(torch.tensor(2.0), {"flops": torch.tensor(5.0)})
    window.accept()
    window.add(torch.tensor(9.0), {"flops": torch.tensor(6.0)})
    window.accept()
    assert window.totals() == {"flops": (13.0, 3), "loss": (12.0, 2)}


def test_a_term_that_only_some_batches_have_is_a_mean_over_those():
    window = LossWindow()
    window.add(torch.tensor(1.0), {"a": torch.tensor(4.0)})
    window.add(torch.tensor(1.0), {"b": torch.tensor(5.0)})
    window.accept()
    assert window.totals() == {"a": (4.0, 1), "b": (5.0, 1), "loss": (2.0, 1)}


def test_a_refused_step_leaves_nothing_behind():
    window = LossWindow()
    window.add(torch.tensor(float("nan")), {})
    window.refuse()
    assert window.totals() == {}
    assert window.refused == 1


def test_small_terms_do_not_drown_in_float32():
    window = LossWindow()
    for _ in range(3):
        window.add(torch.tensor(1e8), {"tiny": torch.tensor(1.0)})
        window.accept()
    window.add(torch.tensor(0.25), {})
    window.accept()
    assert window.totals()["loss"] == (3e8 + 0.25, 4)


def test_a_window_goes_on_where_a_checkpoint_interrupted_it():
    window = LossWindow()
    window.load({"flops": [13.0, 3], "loss": [12.0, 2]}, steps=2, refused=1, device=torch.device("cpu"))
    window.add(torch.tensor(3.0), {"flops": torch.tensor(3.0)})
    window.accept()
    assert window.totals() == {"flops": (16.0, 4), "loss": (15.0, 3)}
    assert window.refused == 1


def test_ranks_add_up():
    assert add_totals([{"a": (1.0, 2)}, {"a": (2.0, 2), "b": (5.0, 1)}]) == {"a": (3.0, 4), "b": (5.0, 1)}


def test_a_resume_cuts_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    file = HistoryFile(tmp_path / "history.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 1 / 3})
    with file.path.open("a") as out:
        out.write('{"step": 4, "lo')
    file.begin(2)
    assert rows(file.path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}]
    file.begin(0)
    assert file.path.read_text() == ""


def test_numbers_that_are_not_finite_become_null(tmp_path):
    file = HistoryFile(tmp_path / "history.jsonl")
    file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "text": "나"})
    assert file.path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "text": "나"}\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    trainer = sparse_trainer(folder, max_steps=2, logging_steps=1)
    trainer.train()
    return trainer, rows(folder / "history.jsonl")


def test_loss_components_are_logged_unweighted_and_unrounded(trained):
    _, history = trained
    row = history[1]
    assert row["loss_flops"] > 0.5  # weighted with 5e-5 and rounded to four decimals it would read 0.0001
    assert row["loss_flops"] != round(row["loss_flops"], 4)
    assert row["loss"] == pytest.approx(row["loss_distance"] + 5e-5 * row["loss_flops"], rel=1e-6)


def test_what_tensorboard_gets_is_what_the_history_holds(trained):
    trainer, history = trained
    for logged, row in zip(trainer.state.log_history, history, strict=False):
        assert logged["loss"] == row["loss"]
        assert logged["loss_flops"] == row["loss_flops"]
        assert "flops" not in logged


def test_the_loss_is_the_one_the_stock_trainer_logs(tmp_path, monkeypatch):
    trainer = sparse_trainer(tmp_path, max_steps=4, logging_steps=2)
    own_log, stock = type(trainer).log, []

    def spy(self, logs, start_time=None):
        stock.extend([logs["loss"]] if "loss" in logs else [])
        own_log(self, logs, start_time)

    monkeypatch.setattr(type(trainer), "log", spy)
    trainer.train()
    assert len(stock) == 2
    assert [row["loss"] for row in rows(tmp_path / "history.jsonl")] == pytest.approx(stock, rel=1e-5)
