"""Training on triplets: schedule, resume across stages, validation, controllers, early stopping, rollback, alarm."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fixtures.pico_terms import save_start
from fixtures.pico_triplets import PretrainedOnTriplets
from soju.core.errors import RegressionError, StoppedError
from soju.core.files import read_json_lines
from soju.data.statistics import spread
from soju.sparse.curriculum import stage_ends
from soju.sparse.neural import term_costs
from soju.sparse.triplets import training as triplets_training
from soju.sparse.triplets.losses import stages_of
from soju.sparse.triplets.training import TripletsValidation

STEPS = 12
ENDS = [5, 9, 12]
"""Stages of v23 in twelve steps."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


OVERRIDES = (
    "sparsity.query_terms=15",
    "sparsity.document_terms=20",
    "losses.flops=0.01",
    "training.save_total_limit=9",
)


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    pico = PretrainedOnTriplets(tmp_path_factory.mktemp("straight"), *OVERRIDES, start=start)
    pico.train()
    return pico


def last(folder):
    return folder / "checkpoints" / f"checkpoint-{STEPS}"


def stop_after(monkeypatch, step):
    """Send SIGTERM once, at the end of a step."""
    original = triplets_training.Steering.on_step_end
    sent = []

    def on_step_end(self, args, state, control, **more):
        original(self, args, state, control, **more)
        if state.global_step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(triplets_training.Steering, "on_step_end", on_step_end)


def test_the_stages_of_this_run_end_where_the_test_says(straight):
    assert stage_ends(stages_of(straight.config), STEPS) == ENDS


@pytest.mark.parametrize("step", [ENDS[0] - 1, ENDS[0], ENDS[1] - 1, ENDS[1]])
def test_a_run_resumed_around_a_stage_boundary_ends_in_the_same_bits(straight, start, tmp_path, monkeypatch, step):
    pico = PretrainedOnTriplets(tmp_path, *OVERRIDES, start=start)
    stop_after(monkeypatch, step)
    with pytest.raises(StoppedError):
        pico.train()
    pico.train()
    expected = load_file(last(straight.folder) / "model.safetensors")
    found = load_file(last(tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("extra_state.json",):
        ours, theirs = (json.loads((last(folder) / name).read_text()) for folder in (tmp_path, straight.folder))
        for part in ("recipe.sparsity_query", "recipe.sparsity_document", "recipe.alarm"):
            assert ours[part] == theirs[part]


def test_the_learning_rate_in_the_history_is_that_of_the_schedule(straight):
    rows = {row["step"]: row for row in read_json_lines(straight.folder / "history.jsonl") if "loss" in row}
    # the rate of a step is that of the steps done before it; two of twelve steps warm up
    assert rows[1]["learning_rate"] == 0.0
    assert rows[4]["learning_rate"] == pytest.approx(1e-3 * (1 + torch.cos(torch.tensor(torch.pi / 10)).item()) / 2)
    assert rows[12]["learning_rate"] < 0.25e-3


def test_the_history_holds_every_loss_its_share_and_the_sparsity(straight):
    row = [row for row in read_json_lines(straight.folder / "history.jsonl") if "loss" in row][-1]
    for name in ("infonce", "self", "positive", "margin", "flops", "minimum", "effective_negatives"):
        assert f"loss_{name}" in row
    for name in ("share_infonce", "share_positive", "active_query", "active_document", "flops_weight_query"):
        assert f"loss_{name}" in row


def test_tensorboard_has_the_published_names(straight):
    files = list((straight.folder / "tensorboard").glob("events*"))
    content = b"".join(file.read_bytes() for file in files)
    for name in (
        b"train/loss", b"train/loss_infonce", b"train/loss_flops", b"train/learning_rate", b"train/gradient_norm",
        b"val/loss", b"val/mrr_10",
    ):  # fmt: skip
        assert name in content


def test_the_controllers_moved_the_weights(straight):
    state = json.loads((last(straight.folder) / "extra_state.json").read_text())
    for side in ("query", "document"):
        assert state[f"recipe.sparsity_{side}"]["weight"] != pytest.approx(0.01, rel=1e-3)


def test_validation_is_retrieval_over_the_texts_of_the_dev_triplets(straight):
    validation = TripletsValidation(straight.dev, straight.config, pad_id=0)
    found = validation(straight.student())
    model = straight.student()
    texts = straight.dev.texts
    documents = [texts[number] for number in dict.fromkeys(straight.dev.numbers_R3[:, 1:].ravel().tolist())]
    dense = torch.nn.functional.normalize(torch.from_numpy(model.encode_sparse(documents).toarray()), dim=1)
    ranks = []
    for query, positive, _ in straight.dev.numbers_R3.tolist():
        scores = dense @ torch.from_numpy(model.encode_sparse([texts[query]]).toarray())[0]
        place = int((scores > scores[documents.index(texts[positive])]).sum()) + 1
        ranks.append(1 / place if scores[documents.index(texts[positive])] > 0 else 0.0)
    assert found["mrr@10"] == pytest.approx(sum(ranks) / len(ranks), abs=1e-6)


def test_patience_ends_a_training_that_does_not_improve(start, tmp_path, monkeypatch):
    monkeypatch.setattr(TripletsValidation, "__call__", lambda self, *a, **k: {"mrr@10": 0.5, "loss": 1.0})
    overrides = ("training.patience=2", "training.eval_steps=1", "training.max_steps=12")
    pico = PretrainedOnTriplets(tmp_path, *overrides, start=start)
    trained = pico.train()
    assert trained.last.name == "checkpoint-3"  # the first is the best, then two without a better one


def test_a_collapse_is_recorded_and_rolled_back_until_the_run_gives_up(start, tmp_path):
    overrides = (
        "losses.flops=50", "losses.infonce=0", "losses.positive_terms=0", "losses.self_terms=0",
        "losses.minimum_activation=0", "training.logging_steps=1", "training.learning_rate=1.0",
        "training.max_rollbacks=1", "training.eval_steps=100", "training.max_steps=100",
    )  # fmt: skip
    pico = PretrainedOnTriplets(tmp_path, *overrides, start=start)
    with pytest.raises(RegressionError, match="collapse"):
        pico.train()
    assert "collapse" in read_json_lines(tmp_path / "alarms.jsonl")[0]["alarm"]
    assert read_json_lines(tmp_path / "rollbacks.jsonl")


def test_accumulation_is_one_large_batch_for_losses_by_row_and_with_cached_for_all(start, tmp_path):
    """One step on eight rows: in one piece, in four pieces cached, and in four pieces without InfoNCE and FLOPS."""

    def weights(name, *overrides):
        common = (
            "training.max_steps=1", "training.warmup_steps=0", "training.learning_rate=0.1",
            "training.max_grad_norm=1000", *overrides,
        )  # fmt: skip
        pico = PretrainedOnTriplets(tmp_path / name, *common, start=start)
        trainer = pico.trainer()
        trainer.args.optim = "sgd"
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        return {key: value.clone() for key, value in trainer.model.state_dict().items()}

    one = ("training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1")
    cached = (
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=4",
        "training.cached=true",
    )
    pieces = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4")
    by_row = ("losses.infonce=0", "losses.flops=0", "losses.margin=1")
    expected, found = weights("one", *one), weights("cached", *cached)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    without, apart = weights("rows", *one, *by_row), weights("pieces", *pieces, *by_row)
    for name, value in without.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-4, atol=1e-6, msg=name)
    uncached = weights("uncached", *pieces)
    assert any(not torch.allclose(uncached[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())


def test_planned_steps_count_whole_batches(start, tmp_path):
    pico = PretrainedOnTriplets(tmp_path, "training.max_steps=null", "training.num_train_epochs=3", start=start)
    assert pico.lesson.planned() == {"batches": 7, "steps": 21}  # 29 rows of 4


def test_term_costs_punish_common_terms_unless_asked_otherwise(start, tmp_path):
    pico = PretrainedOnTriplets(tmp_path, start=start)
    student = pico.student()
    counts = pico.rows.texts_with_term(student.get_embedding_dimension())
    common, rare = int(counts.argmax()), int((counts == 1).argmax())
    inverse, direct = (term_costs(pico.rows, student, form) for form in ("inverse", "direct"))
    assert inverse[common] > inverse[rare]
    assert direct[common] < direct[rare]
    assert term_costs(pico.rows, student, None) is None


def test_rows_to_validate_on_are_spread_evenly():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]
