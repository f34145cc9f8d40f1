"""A regression in the middle of training: nothing lost, rolled back, one thing changed, all of it recorded."""

import pytest
import torch

from soju.core.errors import RegressionError
from soju.core.files import read_json_lines, verify_manifest
from soju.core.results import Score
from soju.training.checkpoints import checkpoint_step, newest_verified, resume_path, set_aside_after
from soju.training.gate import QualityGate, Threshold, passed_steps, read_verdicts, record_verdict
from soju.training.rollback import OnEvaluation, RollbackSettings, train_with_rollback
from training.pico_trainers import plain_trainer, weights

GATE = QualityGate([Threshold(metric="recall@10", max_drop=0.05)])
BASELINE = [Score("recall@10", "teacher", "dev", 0.8, "fraction", True, "k:10")]


def train(folder, recall):
    """Train with rollback; `recall` maps (attempt, step) to what an evaluation finds."""
    checkpoints, verdicts = folder / "checkpoints", folder / "verdicts.jsonl"
    attempts = []

    def attempt_once(attempt):
        attempts.append(attempt)

        def judge(step, metrics):
            assert metrics["eval_loss"] > 0
            score = Score("recall@10", "student", "dev", recall(attempt.number, step), "fraction", True, "k:10")
            verdict = GATE.judge([score], BASELINE)
            record_verdict(verdicts, verdict, where="training", step=step, attempt=attempt.number, scores=[score])
            if not verdict.passed:
                raise RegressionError(verdict.reasons[0])

        trainer = plain_trainer(
            folder,
            extra={"callbacks": [OnEvaluation(judge)], "learning_rate_scale": attempt.learning_rate_scale},
            data_seed=7 + attempt.data_order,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=3,
            max_steps=9,
        )
        trainer.train(attempt.resume_from)
        return trainer

    trainer = train_with_rollback(
        attempt_once,
        settings=RollbackSettings(max_rollbacks=2),
        record=folder / "rollbacks.jsonl",
        newest=lambda: resume_path(checkpoints).path,
        last_passed=lambda: newest_verified(checkpoints, steps=passed_steps(read_verdicts(verdicts))).path,
        go_back=lambda path: set_aside_after(checkpoints, checkpoint_step(path) if path else 0),
    )
    return trainer, attempts


def test_the_run_goes_back_to_the_last_checkpoint_that_passed_and_finishes(tmp_path):
    torch.set_num_threads(1)
    trainer, attempts = train(tmp_path, lambda attempt, step: 0.5 if (attempt, step) in {(0, 6), (1, 9)} else 0.8)
    assert trainer.state.global_step == 9
    assert [(a.resume_from and a.resume_from.name, a.change) for a in attempts] == [
        (None, "as configured"),
        ("checkpoint-3", "data order 1"),
        ("checkpoint-6", "learning rate × 0.5"),
    ]
    recorded = [(row["attempt"], row["outcome"]) for row in read_json_lines(tmp_path / "rollbacks.jsonl")]
    assert recorded == [(n, what) for n in (0, 1) for what in ("started", "rolled back")] + [
        (2, "started"),
        (2, "finished"),
    ]
    verdicts = [(row["attempt"], row["step"], row["passed"]) for row in read_verdicts(tmp_path / "verdicts.jsonl")]
    assert verdicts == [(0, 3, True), (0, 6, False), (1, 6, True), (1, 9, False), (2, 9, True)]
    history = read_json_lines(tmp_path / "history.jsonl")
    steps = [row["step"] for row in history if "learning_rate" in row]
    assert steps == sorted(set(steps))  # no row of an attempt that was rolled back
    for step in (3, 6, 9):
        verify_manifest(tmp_path / "checkpoints" / f"checkpoint-{step}")


def test_another_data_order_gives_other_weights_and_the_changed_rate_is_in_force(tmp_path):
    torch.set_num_threads(1)
    plain, _ = train(tmp_path / "plain", lambda attempt, step: 0.8)
    changed, _ = train(tmp_path / "changed", lambda attempt, step: 0.5 if attempt < 2 and step == 9 else 0.8)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(changed).items())
    rates = [
        next(row["learning_rate"] for row in read_json_lines(tmp_path / name / "history.jsonl") if row["step"] == 8)
        for name in ("plain", "changed")
    ]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_a_run_that_cannot_be_mended_ends_with_its_good_checkpoint_in_place(tmp_path):
    torch.set_num_threads(1)
    with pytest.raises(RegressionError, match=r"went from 0\.8 to 0\.5.* gave up after 2 rollbacks"):
        train(tmp_path, lambda attempt, step: 0.5 if step == 6 else 0.8)
    assert newest_verified(tmp_path / "checkpoints").path.name == "checkpoint-3"
