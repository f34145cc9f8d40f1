"""A step that is not finite is refused, named, counted; several in a row end the run; a resume stays exact."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback

from soju.core.errors import BadNumbersError
from soju.training.checkpoints import list_checkpoints
from soju.training.history import BadNumbers, describe
from training.pico_trainers import TwoTerms, plain_trainer, sparse_trainer, weights

NAN, INF = float("nan"), float("inf")


def parameter(*gradient):
    value = nn.Parameter(torch.zeros(len(gradient)))
    value.grad = torch.tensor(gradient)
    return value


def micro_batch(total=1.0, **terms):
    return {"loss": torch.tensor(total), **{name: torch.tensor(value) for name, value in terms.items()}}


@pytest.mark.parametrize(
    ("micro_batches", "expected"),
    [
        ([micro_batch(NAN, flops=NAN, margin=1.0)], "flops is nan"),
        ([micro_batch(INF, flops=-INF)], "flops is infinite"),
        ([micro_batch(NAN, margin=[1.0, NAN, 2.0, INF])], "margin is nan in rows 1, 3"),
        ([micro_batch(NAN, margin=[INF, 1.0])], "margin is infinite in row 0"),
        ([micro_batch(), micro_batch(NAN, flops=NAN)], "flops is nan of micro-batch 2"),
        ([micro_batch(NAN, flops=1.0)], "loss is nan"),
        ([micro_batch(NAN, margin=[NAN] * 12)], "margin is nan in rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
        ([micro_batch(NAN, flops=NAN, margin=[INF])], "flops is nan, margin is infinite in row 0"),
    ],
)
def test_the_term_and_the_rows_are_named(micro_batches, expected):
    assert describe(micro_batches, [], total="loss") == expected


def test_a_gradient_is_named_by_its_parameters_when_the_loss_is_finite():
    parameters = [("a", parameter(1.0)), ("b", parameter(NAN, 1.0)), ("c", nn.Parameter(torch.zeros(1)))]
    assert describe([micro_batch()], parameters, total="loss") == "the gradient of b is not finite while the loss is"
    everywhere = [("a", parameter(NAN)), ("b", parameter(NAN))]
    assert describe([micro_batch()], everywhere, total="loss") == "the gradient is not finite while the loss is"


def test_only_refusals_in_a_row_end_the_run():
    bad = BadNumbers(2)
    bad.refuse(1, "x")
    bad.accept()
    bad.refuse(3, "x")
    with pytest.raises(BadNumbersError, match=r"step 4: flops is nan; 2 steps in a row were refused"):
        bad.refuse(4, "flops is nan")
    assert bad.total == 3


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match=">= 1"):
        BadNumbers(0)


class Poisoned(TwoTerms):
    """One row of one micro-batch is NaN; micro-batches are counted from 0 over the whole run."""

    bad = frozenset()
    where = "distance"

    def __init__(self, model):
        super().__init__(model)
        self.seen = 0

    def forward(self, features, labels):
        terms = super().forward(features, labels)
        if self.seen in self.bad:
            terms[self.where] = terms[self.where] * NAN
            if self.where == "distance":
                self.loss_components["distance"][1] = NAN
            else:
                self.loss_components["flops"] = self.loss_components["flops"] * NAN
        self.seen += 1
        return terms


def poisoned(*micro_batches, where="distance"):
    return type("Poisoned", (Poisoned,), {"bad": frozenset(micro_batches), "where": where})


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_bad_micro_batch_refuses_the_whole_step_and_nothing_moves(tmp_path):
    trainer = sparse_trainer(tmp_path, loss=poisoned(3), max_steps=2, save_steps=1, logging_steps=1)
    before = {}
    trainer.add_callback(_at_step_end(1, lambda: before.update(weights(trainer))))
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    refused, logged = history(tmp_path)[1:]
    assert refused == {"step": 2, "refused": "distance is nan in row 1 of micro-batch 2"}
    assert logged["refused_steps"] == 1
    assert logged["loss"] is None  # of no accepted step there is no mean
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-1", "checkpoint-2"]


def test_moments_of_the_optimiser_do_not_move_in_a_refused_step(tmp_path):
    trainer = sparse_trainer(tmp_path, loss=poisoned(2, where="flops"), max_steps=3)
    steps = []
    trainer.add_callback(_at_step_end(None, lambda: steps.append(_adam_steps(trainer))))
    trainer.train()
    assert steps == [1, 1, 2]


def test_the_mean_of_a_window_leaves_refused_steps_out(tmp_path):
    clean = sparse_trainer(tmp_path / "clean", max_steps=1, logging_steps=1)
    clean.train()
    trainer = sparse_trainer(tmp_path / "bad", loss=poisoned(2, 3), max_steps=2, logging_steps=2)
    trainer.train()
    (row,) = history(tmp_path / "clean")
    refused, logged = history(tmp_path / "bad")
    assert logged["loss"] == row["loss"]
    assert logged["loss_flops"] == row["loss_flops"]
    assert refused["step"] == 2


def test_several_in_a_row_end_the_run_with_the_last_good_checkpoint_in_place(tmp_path):
    trainer = sparse_trainer(tmp_path, loss=poisoned(*range(4, 99)), extra={"bad_steps_limit": 3}, save_steps=1)
    with pytest.raises(BadNumbersError, match=r"step 5: distance is nan in row 1 .* 3 steps in a row"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][-1] == "checkpoint-4"


def test_the_count_in_a_row_goes_over_an_interruption(tmp_path):
    def train(max_steps, resume):
        extra = {"bad_steps_limit": 3}
        loss = poisoned(*range(99))
        sparse_trainer(tmp_path, loss=loss, extra=extra, save_steps=1, max_steps=max_steps).train(resume)

    train(2, None)
    with pytest.raises(BadNumbersError, match="step 3"):
        train(3, True)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_refused_too(tmp_path):
    trainer = plain_trainer(tmp_path, max_steps=2, max_grad_norm=0.0, logging_steps=1)
    word_embeddings = trainer.model.bert.embeddings.word_embeddings.weight
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * NAN if len(calls) == 1 else gradient

    word_embeddings.register_hook(poison)
    trainer.train()
    assert history(tmp_path)[0]["refused"].startswith("the gradient")
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


@pytest.fixture
def half_precision(monkeypatch):
    """A trainer that trains as fp16 on a GPU does, on the CPU: autocast, and a scale that overflows at first."""
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")

    def make(folder, **settings):
        trainer = plain_trainer(folder, save_steps=3, logging_steps=1, **settings)
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        return trainer

    return make


def test_an_overflow_that_the_loss_scaler_finds_is_not_counted_and_resumes_exactly(tmp_path, half_precision):
    trainer = half_precision(tmp_path, max_steps=12, extra={"bad_steps_limit": 2})
    trainer.train()
    rows = history(tmp_path)
    overflows = [row for row in rows if row.get("grad_norm", 0) is None and row["loss"] is not None]
    assert len(overflows) >= 3  # more in a row than the limit
    assert trainer._bad_numbers.total == sum("refused" in row for row in rows) <= 1
    resumed = half_precision(tmp_path, max_steps=12, extra={"bad_steps_limit": 2})
    resumed.train(tmp_path / "checkpoints" / "checkpoint-3")
    assert resumed.accelerator.scaler.get_scale() == trainer.accelerator.scaler.get_scale()
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(resumed).items())


def test_a_scale_that_was_halved_down_to_one_does_not_excuse_the_gradient(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.accelerator.scaler = Scaler(65536.0)
    assert trainer._scaler_will_skip()
    trainer.accelerator.scaler = Scaler(1.0)
    assert not trainer._scaler_will_skip()


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale


def _adam_steps(trainer):
    return max(int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values())


def _at_step_end(step, act):
    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if step in (None, state.global_step):
                act()

    return AtStepEnd()
