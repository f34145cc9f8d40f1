"""Rollback: what is changed next, from where, and that an interruption does not change the answer."""

from pathlib import Path

import pytest

from soju.core.errors import BadNumbersError, RegressionError, StoppedError
from soju.core.files import read_json_lines
from soju.core.results import Score
from soju.training.gate import Verdict, passed_steps, read_verdicts, record_verdict
from soju.training.rollback import Attempt, RollbackSettings, next_attempt, train_with_rollback

SETTINGS = RollbackSettings(max_rollbacks=4, learning_rate_factor=0.5)


def plan(failures, settings=SETTINGS):
    failed = []
    for _ in range(failures):
        failed.append(next_attempt(failed, settings))
    return next_attempt(failed, settings)


@pytest.mark.parametrize(
    ("failures", "data_order", "scale", "change"),
    [
        (0, 0, 1.0, "as configured"),
        (1, 1, 1.0, "data order 1"),
        (2, 1, 0.5, "learning rate × 0.5"),
        (3, 2, 0.5, "data order 2"),
        (4, 2, 0.25, "learning rate × 0.5"),
    ],
)
def test_each_rollback_changes_one_thing_in_turn(failures, data_order, scale, change):
    assert plan(failures) == Attempt(failures, change, data_order, scale)


def test_a_guard_of_what_the_model_knows_lowers_the_learning_rate_first():
    settings = RollbackSettings(max_rollbacks=4, change_first="learning rate")
    assert [plan(failures, settings).learning_rate_scale for failures in range(5)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    assert [plan(failures, settings).data_order for failures in range(5)] == [0, 0, 1, 1, 2]


def test_after_the_last_rollback_there_is_no_attempt():
    assert plan(5) is None
    assert plan(1, RollbackSettings(max_rollbacks=0)) is None


class Run:
    """A run whose attempts end as told; checkpoints are names."""

    def __init__(self, folder, *endings, passed="checkpoint-10", newest="checkpoint-15"):
        self.record = folder / "rollbacks.jsonl"
        self.endings = list(endings)
        self.attempts = []
        self.went_back_to = []
        self.passed, self.newest = passed, newest

    def train(self, attempt):
        self.attempts.append(attempt)
        ending = self.endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        return ending

    def __call__(self, **settings):
        return train_with_rollback(
            self.train,
            settings=RollbackSettings(**{"max_rollbacks": 2, **settings}),
            record=self.record,
            newest=lambda: Path(self.newest),
            last_passed=lambda: self.passed and Path(self.passed),
            go_back=self.went_back_to.append,
        )


def rows(run):
    return [
        (row["attempt"], row["outcome"], row.get("change"), row.get("reason")) for row in read_json_lines(run.record)
    ]


def test_a_run_that_passes_is_one_recorded_attempt_from_the_beginning(tmp_path):
    run = Run(tmp_path, "weights")
    assert run() == "weights"
    assert run.attempts == [Attempt()]
    assert run.went_back_to == []
    assert rows(run) == [(0, "started", "as configured", None), (0, "finished", None, "")]


def test_a_regression_goes_back_to_the_last_checkpoint_that_passed(tmp_path):
    run = Run(tmp_path, RegressionError("recall fell"), BadNumbersError("nan"), "weights")
    assert run() == "weights"
    assert [(a.data_order, a.learning_rate_scale) for a in run.attempts] == [(0, 1.0), (1, 1.0), (1, 0.5)]
    assert [a.resume_from for a in run.attempts] == [None, Path("checkpoint-10"), Path("checkpoint-10")]
    assert run.went_back_to == [Path("checkpoint-10")] * 2
    assert rows(run)[1:4] == [
        (0, "rolled back", None, "recall fell"),
        (1, "started", "data order 1", None),
        (1, "rolled back", None, "nan"),
    ]


def test_when_nothing_passed_yet_it_starts_again_from_the_beginning(tmp_path):
    run = Run(tmp_path, RegressionError("fell"), "weights", passed=None)
    run()
    assert run.attempts[1].resume_from is None
    assert run.went_back_to == [None]


def test_it_gives_up_after_the_last_rollback_and_says_so(tmp_path):
    run = Run(tmp_path, *[BadNumbersError("step 3: flops is nan")] * 3)
    with pytest.raises(
        BadNumbersError, match=r"step 3: flops is nan; gave up after 2 rollbacks, see .*rollbacks\.jsonl"
    ):
        run()
    assert len(run.attempts) == 3
    with pytest.raises(RegressionError, match="gave up after 2 rollbacks; change its settings"):
        run()
    assert len(run.attempts) == 3


def test_an_interrupted_attempt_goes_on_from_its_newest_checkpoint_with_the_same_change(tmp_path):
    run = Run(tmp_path, RegressionError("fell"), StoppedError("SIGTERM", signal_number=15), "weights")
    with pytest.raises(StoppedError):
        run()
    assert run() == "weights"
    assert run.attempts[2] == Attempt(1, "data order 1", 1, 1.0, Path("checkpoint-15"))
    assert run.went_back_to == [Path("checkpoint-10")]  # not a second time
    assert [row[1] for row in rows(run)] == ["started", "rolled back", "started", "finished"]


def test_a_kill_between_going_back_and_starting_goes_back_again(tmp_path):
    run = Run(tmp_path, RegressionError("fell"), StoppedError("x", signal_number=15), "weights")
    with pytest.raises(StoppedError):
        run()
    lines = run.record.read_text().splitlines(keepends=True)
    run.record.write_text("".join(lines[:2]))  # the row of the second start is lost
    assert run() == "weights"
    assert run.attempts[2].resume_from == Path("checkpoint-10")
    assert run.went_back_to == [Path("checkpoint-10")] * 2


def test_other_errors_end_the_run(tmp_path):
    run = Run(tmp_path, ValueError("shape"), "weights")
    with pytest.raises(ValueError, match="shape"):
        run()
    assert [row[1] for row in rows(run)] == ["started"]


def test_verdicts_are_lines_that_name_the_steps_that_passed(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    bad = Score("recall@10", "student", "dev", float("nan"), "fraction", True, "k:10")
    record_verdict(path, Verdict(True), where="training", step=10)
    record_verdict(path, Verdict(True), where="training", step=20)
    record_verdict(path, Verdict(False, ("recall@10 on dev is nan",)), where="training", step=30, scores=[bad])
    record_verdict(path, Verdict(False, ("fell",)), where="training", step=20, attempt=1)
    record_verdict(path, Verdict(True), where="quantization")
    with path.open("a") as out:
        out.write('{"where": "trai')  # cut short by a kill
    verdicts = read_verdicts(path)
    assert passed_steps(verdicts) == {10}
    assert verdicts[2]["scores"][0]["value"] is None
    assert verdicts[3]["attempt"] == 1
    record_verdict(path, Verdict(True), where="training", step=40)
    assert passed_steps(read_verdicts(path)) == {10, 40}
