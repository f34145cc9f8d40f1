"""The weighted sum of the losses of triplets, its schedules, shares, controllers and the cached path."""

import numpy as np
import pytest
import torch

from fixtures.pico_terms import save_start
from fixtures.pico_triplets import PretrainedOnTriplets
from soju.sparse.triplets.config import TripletsTeacherSettings
from soju.sparse.triplets.losses import TripletsLoss, info_nce, similarities
from soju.sparse.triplets.rows import PairScores, TeacherScores, TripletsCollator, teacher_scores
from teachers.pico_teacher import save_pico_teacher


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


def computed(start, tmp_path, *overrides, rows=range(6), teacher: TeacherScores | None = None, position=(0, 12)):
    """Return loss module, weighted losses and raw terms of one batch."""
    pico = PretrainedOnTriplets(tmp_path, *overrides, start=start)
    batch = TripletsCollator(pico.rows, teacher, pad_id=0)([{"row": row} for row in rows])
    model = pico.student()
    loss = TripletsLoss(model, pico.config, position=lambda: position)
    features = {name.removeprefix("text_"): value for name, value in batch.items() if name != "label"}
    return loss, loss([features], batch["label"]), features, batch["label"]


def test_infonce_is_weighted_by_base_and_stage(start, tmp_path):
    loss, weighted, features, label = computed(start, tmp_path, position=(0, 12))
    weights = loss.model(features)["sentence_embedding"]
    scores = similarities(weights[:6], weights[6:], similarity="cosine")
    expected = info_nce(scores, label["same"], temperature=0.08)
    torch.testing.assert_close(loss.loss_components["infonce"], expected.detach())
    torch.testing.assert_close(weighted["infonce"], 2.5 * 0.5 * expected)


@pytest.mark.parametrize(("step", "temperature", "infonce"), [(0, 0.08, 0.5), (5, 0.05, 0.75), (9, 0.04, 1.0)])
def test_the_stage_follows_the_step_alone(start, tmp_path, step, temperature, infonce):
    loss, *_ = computed(start, tmp_path, position=(step, 12))
    assert (loss.stage.temperature, loss.stage.infonce) == (temperature, infonce)


def test_the_penalty_waits_then_rises_with_the_square_of_the_steps(start, tmp_path):
    overrides = ("losses.flops_from=0.25", "losses.flops_rise=0.5")
    ramps = [computed(start, tmp_path, *overrides, position=(step, 8))[0].ramp for step in (0, 1, 2, 4, 6, 8)]
    assert ramps == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]


def test_losses_of_weight_zero_are_logged_only(start, tmp_path):
    loss, weighted, *_ = computed(start, tmp_path, "losses.margin=0")
    assert "margin" not in weighted
    assert "margin" in loss.loss_components


def test_shares_add_up_to_one(start, tmp_path):
    loss, weighted, *_ = computed(start, tmp_path, "losses.margin=2")
    shares = {name: float(value) for name, value in loss.loss_components.items() if name.startswith("share_")}
    assert shares.keys() == {f"share_{name}" for name in weighted}
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-5)


def test_regularize_query_leaves_documents_alone(start, tmp_path):
    both, *_ = computed(start, tmp_path)
    query, *_ = computed(start, tmp_path, "losses.regularize=query")
    assert query.loss_components["flops"] < both.loss_components["flops"]


def test_controllers_count_the_active_terms_of_their_side(start, tmp_path):
    loss, _, features, _ = computed(start, tmp_path)
    active = (loss.model(features)["sentence_embedding"] > 0).sum(dim=1).float()
    for side, texts in (("query", active[:6]), ("document", active[6:])):
        loss.controllers[side].step()
        assert loss.controllers[side].active == pytest.approx(float(texts.mean()))


def test_the_loss_of_a_validation_moves_no_controller(start, tmp_path):
    loss, _, features, label = computed(start, tmp_path)
    loss.controllers["query"].step()
    before = loss.controllers["query"].state_dict()
    loss.eval()
    with torch.no_grad():
        loss([features], label)
    loss.controllers["query"].step()
    assert loss.controllers["query"].state_dict() == before


def test_the_cached_path_gives_the_losses_and_gradients_of_the_large_batch(start, tmp_path):
    found = {}
    for cached in ("true", "false"):
        overrides = (
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=3",
            f"training.cached={cached}",
            "losses.margin=1",
        )
        loss, weighted, *_ = computed(start, tmp_path, *overrides)
        sum(weighted.values()).backward()
        gradients = [parameter.grad for parameter in loss.model.parameters() if parameter.grad is not None]
        found[cached] = ({name: value.detach() for name, value in weighted.items()}, gradients)
    for name, value in found["false"][0].items():
        torch.testing.assert_close(found["true"][0][name], value, rtol=1e-5, atol=1e-6)
    assert len(found["true"][1]) == len(found["false"][1]) > 0
    for ours, theirs in zip(found["true"][1], found["false"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_teachers_margin_is_learned_where_it_is_known(start, tmp_path):
    scores = PairScores(np.array([[1.0, 0.0]] * 3 + [[np.nan, np.nan]] * 27), calibrate=False)
    overrides = (
        "losses.distillation=1.5", "losses.distillation_form=margin_mse", "teacher={kind: scores}",
    )  # fmt: skip
    loss, weighted, features, _ = computed(start, tmp_path, *overrides, teacher=scores)
    weights = loss.model(features)["sentence_embedding"]
    found = similarities(weights[:6], weights[6:], similarity="cosine")
    margins = (found[:, :6].diagonal() - found[:, 6:].diagonal())[:3]
    torch.testing.assert_close(weighted["distillation"], 1.5 * (margins - 1.0).square().mean())


def test_a_bi_encoder_of_the_users_own_vectors_teaches_its_ranking(start, tmp_path):
    pico = PretrainedOnTriplets(tmp_path, start=start)
    settings = TripletsTeacherSettings(
        model=str(save_pico_teacher(tmp_path / "teacher")), cache=tmp_path / "cache", calibrate=False
    )
    teacher = teacher_scores(settings, pico.rows, seed=0)
    overrides = ("losses.distillation=1", "teacher={model: unused}")
    _, weighted, _, label = computed(start, tmp_path, *overrides, teacher=teacher)
    assert label["known"].all()
    assert label["teacher"].abs().max() <= 1.0001
    assert float(weighted["distillation"].detach()) > 0


def test_rows_the_teacher_did_not_read_are_validated_without_it(start, tmp_path):
    overrides = ("losses.distillation=1", "teacher={model: unused}")
    pico = PretrainedOnTriplets(tmp_path, *overrides, start=start)
    student = pico.student()
    loss = TripletsLoss(student, pico.config, position=lambda: (0, 12))
    assert pico.lesson.validation.with_loss(loss)(student)["loss"] > 0
    assert "loss" not in pico.lesson.validation(student)
    with pytest.raises(KeyError, match="teacher"):  # in training it is never left out
        computed(start, tmp_path, *overrides)
