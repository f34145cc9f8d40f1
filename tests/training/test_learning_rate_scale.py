"""A resumed run can have another learning rate, once."""

import pytest
import torch

from soju.training.checkpoints import list_checkpoints
from soju.training.reliable import scale_learning_rate
from training.pico_trainers import plain_trainer


def made(schedule=lambda step: 1 / (1 + step)):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def test_everything_to_come_is_scaled():
    optimizer, scheduler = made()
    optimizer.step()
    scheduler.step()
    scale_learning_rate(optimizer, scheduler, 0.5)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.2
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.4 / 3)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(ValueError, match="factor must be > 0"):
        scale_learning_rate(*made(), factor)


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    optimizer, _ = made()
    with pytest.raises(ValueError, match="has no base_lrs"):
        scale_learning_rate(optimizer, object(), 0.5)


def rates(folder, scale, steps):
    extra = {"learning_rate_scale": scale}
    trainer = plain_trainer(folder, extra=extra, max_steps=steps, logging_steps=1, lr_scheduler_type="constant")
    trainer.train(bool(list_checkpoints(folder / "checkpoints")) or None)
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_a_scale_holds_over_a_resume_and_is_not_applied_twice(tmp_path):
    assert rates(tmp_path, 1.0, 1) == [5e-3]
    assert rates(tmp_path, 0.5, 2) == [5e-3, 2.5e-3]
    assert rates(tmp_path, 0.5, 3) == [5e-3, 2.5e-3, 2.5e-3]
    assert rates(tmp_path, 0.25, 4) == [5e-3, 2.5e-3, 2.5e-3, 1.25e-3]
