from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

import soju.translation.loss as module
from soju.translation.loss import (
    IGNORED,
    DistillationLoss,
    LossSettings,
    distillation_loss,
    distillation_loss_from_states,
    hidden_state_error,
)

SETTINGS = LossSettings()


def random_case(rows, vocabulary, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocabulary, generator=generator, dtype=dtype).requires_grad_()
    teacher = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=dtype)
    return student, teacher, torch.randint(vocabulary, (rows,), generator=generator)


def by_torch(student, teacher, labels, settings):
    """The same definition by kl_div and cross_entropy."""
    kept = labels != IGNORED
    t = settings.temperature
    divergence = t**2 * kl_div(
        log_softmax(student[kept] / t, -1), log_softmax(teacher[kept] / t, -1), log_target=True, reduction="batchmean"
    )
    smoothed = cross_entropy(student, labels, label_smoothing=settings.label_smoothing, ignore_index=IGNORED)
    return divergence, smoothed, settings.alpha * divergence + settings.beta * smoothed


def test_the_hand_worked_pair_of_logits():
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)  # p = 1/2, 1/2
    teacher = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)  # at T = 2: q = 3/4, 1/4
    terms = distillation_loss(
        student, teacher, torch.tensor([0]), LossSettings(temperature=2, alpha=0.8, beta=0.2, label_smoothing=0.2)
    )
    divergence = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert terms.distillation.item() == pytest.approx(divergence)
    assert terms.cross_entropy.item() == pytest.approx(math.log(2))
    assert terms.loss.item() == pytest.approx(0.8 * divergence + 0.2 * math.log(2))
    terms.loss.backward()
    # 0.8 * 2 * (1/2 - 3/4) = -0.4 and 0.2 * (1/2 - 0.9) = -0.08
    torch.testing.assert_close(student.grad, torch.tensor([[-0.48, 0.48]], dtype=torch.float64))
    assert terms.distillation_gradient_norm.item() == pytest.approx(0.4 * math.sqrt(2))
    assert terms.cross_entropy_gradient_norm.item() == pytest.approx(0.08 * math.sqrt(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_are_those_of_torch_in_double_precision(temperature, smoothing, monkeypatch):
    monkeypatch.setitem(module._TILE_CELLS, "cpu", 3 * 50)  # 17 rows are five tiles of 3 and one of 2
    settings = LossSettings(temperature=temperature, label_smoothing=smoothing)
    student, teacher, labels = random_case(17, 50)
    labels[[2, 9, 10]] = IGNORED
    divergence, smoothed, expected = by_torch(student, teacher, labels, settings)
    theirs = torch.autograd.grad(expected, student)[0]
    terms = distillation_loss(student, teacher, labels, settings)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.distillation, divergence, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.cross_entropy, smoothed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, student)[0], theirs, rtol=1e-12, atol=1e-14)


def test_the_gradient_norms_are_those_of_either_weighted_term():
    student, teacher, labels = random_case(9, 30)
    divergence, smoothed, _ = by_torch(student, teacher, labels, SETTINGS)
    terms = distillation_loss(student, teacher, labels, SETTINGS)
    for ours, weighted in (
        (terms.distillation_gradient_norm, SETTINGS.alpha * divergence),
        (terms.cross_entropy_gradient_norm, SETTINGS.beta * smoothed),
    ):
        torch.testing.assert_close(ours, torch.autograd.grad(weighted, student, retain_graph=True)[0].norm())


def test_single_precision_differs_by_less_than_1e_8_from_torch_in_the_gradient():
    student, teacher, labels = random_case(64, 4_000, dtype=torch.float32)
    theirs = torch.autograd.grad(by_torch(student, teacher, labels, SETTINGS)[2], student)[0]
    ours = torch.autograd.grad(distillation_loss(student, teacher, labels, SETTINGS).loss, student)[0]
    assert (ours - theirs).abs().max() < 1e-8


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    terms = distillation_loss(student, teacher, torch.tensor([1]), SETTINGS)
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert torch.isfinite(student.grad).all()


def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient_from_it():
    _, teacher, labels = random_case(5, 20)
    terms = distillation_loss(teacher.clone().requires_grad_(), teacher, labels, SETTINGS)
    assert terms.distillation.item() == pytest.approx(0, abs=1e-12)
    assert terms.distillation_gradient_norm.item() == pytest.approx(0, abs=1e-12)
    assert terms.cross_entropy.item() > 0


def test_gradients_agree_with_finite_differences():
    student, teacher, labels = random_case(3, 7)
    labels[1] = IGNORED
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, labels, SETTINGS).loss, student)


def test_gradients_from_states_agree_with_finite_differences():
    hidden, head, teacher, teacher_head, labels = states(4, 9)
    labels[2] = IGNORED

    def loss(hidden, head):
        return distillation_loss_from_states(hidden, head, teacher, teacher_head, labels, SETTINGS).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


def states(rows, vocabulary, *, width=5, teacher_width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocabulary, width), (rows, teacher_width), (vocabulary, teacher_width))
    hidden, head, teacher, teacher_head = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def test_the_loss_from_states_is_that_of_their_logits(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 4)
    monkeypatch.setitem(module._TILE_CELLS, "cpu", 3 * 20)
    hidden, head, teacher, teacher_head, labels = states(11, 20)
    labels[[0, 5]] = IGNORED
    expected = distillation_loss(hidden @ head.T, teacher @ teacher_head.T, labels, SETTINGS)
    theirs = torch.autograd.grad(expected.loss, (hidden, head))
    terms = distillation_loss_from_states(hidden, head, teacher, teacher_head, labels, SETTINGS)
    for ours, other in zip(terms.named().values(), expected.named().values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
    for ours, other in zip(torch.autograd.grad(terms.loss, (hidden, head)), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


def test_cached_half_precision_states_of_the_teacher_are_taken_as_they_are():
    hidden, head, teacher, teacher_head, labels = states(6, 20, dtype=torch.float32)
    half = teacher.half()
    ours = distillation_loss_from_states(hidden, head, half, teacher_head, labels, SETTINGS).loss
    exact = distillation_loss_from_states(hidden, head, half.float(), teacher_head, labels, SETTINGS).loss
    torch.testing.assert_close(ours, exact)


def test_padding_changes_nothing():
    student, teacher, labels = random_case(6, 12)
    padded_student = torch.full((2, 5, 12), 7.0, dtype=torch.float64)
    padded_teacher, padded_labels = torch.full_like(padded_student, float("nan")), torch.full((2, 5), IGNORED)
    places = torch.tensor([0, 1, 2, 3, 5, 6])  # four positions of the first text, two of the second
    padded_student.view(10, 12)[places] = student.detach()
    padded_teacher.view(10, 12)[places] = teacher
    padded_labels.view(10)[places] = labels
    padded_student.requires_grad_()
    plain = distillation_loss(student, teacher, labels, SETTINGS)
    padded = distillation_loss(padded_student, padded_teacher, padded_labels, SETTINGS)
    for ours, theirs in zip(padded.named().values(), plain.named().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    plain.loss.backward()
    padded.loss.backward()
    expected = torch.zeros(10, 12, dtype=torch.float64)
    expected[places] = student.grad
    torch.testing.assert_close(padded_student.grad.view(10, 12), expected)


def test_eight_small_batches_are_one_large_batch_when_divided_by_the_positions_of_the_step():
    student, teacher, labels = random_case(24, 15)
    labels[3:7] = IGNORED  # the second batch has no real position but two
    positions = int((labels != IGNORED).sum())
    whole = distillation_loss(student, teacher, labels, SETTINGS)
    expected = torch.autograd.grad(whole.loss, student)[0]
    parts = [
        distillation_loss(student[i : i + 3], teacher[i : i + 3], labels[i : i + 3], SETTINGS, positions=positions)
        for i in range(0, 24, 3)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.cross_entropy for part in parts), whole.cross_entropy)
    gradient = sum(torch.autograd.grad(part.loss, student, retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(gradient, expected)


def test_a_batch_without_real_positions_is_worth_nothing():
    student, teacher, labels = random_case(3, 8)
    terms = distillation_loss(student, teacher, torch.full_like(labels, IGNORED), SETTINGS)
    terms.loss.backward()
    assert terms.loss.item() == 0
    assert not student.grad.any()
    hidden, head, teacher, teacher_head, labels = states(3, 8)
    from_states = distillation_loss_from_states(
        hidden, head, teacher, teacher_head, torch.full_like(labels, IGNORED), SETTINGS
    )
    from_states.loss.backward()
    assert from_states.loss.item() == 0
    assert not head.grad.any()


def test_the_value_alone_is_made_without_a_gradient():
    student, teacher, labels = random_case(5, 8)
    with torch.no_grad():
        value = distillation_loss(student, teacher, labels, SETTINGS)
    torch.testing.assert_close(value.loss, distillation_loss(student, teacher, labels, SETTINGS).loss.detach())
    assert not value.loss.requires_grad


def test_half_precision_logits_are_summed_in_single_precision():
    student, teacher, labels = random_case(8, 400, dtype=torch.float32)
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_loss(half, teacher, labels, SETTINGS)
    exact = by_torch(half.detach().double(), teacher.double(), labels, SETTINGS)[2]
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(exact.item(), rel=1e-5)
    terms.loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_under_autocast_the_products_run_in_half_precision_and_the_gradients_are_single():
    hidden, head, teacher, teacher_head, labels = states(200, 40, dtype=torch.float32)
    exact = distillation_loss_from_states(hidden, head, teacher, teacher_head, labels, SETTINGS)
    theirs = torch.autograd.grad(exact.loss, (hidden, head))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_loss_from_states(hidden, head, teacher, teacher_head, labels, SETTINGS)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    for ours, other in zip(torch.autograd.grad(terms.loss, (hidden, head)), theirs, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - other).norm() < 0.02 * other.norm()


def test_the_hidden_state_error_is_that_of_torch_on_real_positions():
    ours, theirs = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([1, IGNORED, 2, 3])
    error = hidden_state_error(ours, theirs, labels)
    torch.testing.assert_close(error, mse_loss(ours[labels != IGNORED], theirs[labels != IGNORED]))
    torch.testing.assert_close(hidden_state_error(ours, theirs, labels, positions=6), error / 2)


def test_the_module_adds_the_error_of_projected_states():
    hidden, head, teacher, teacher_head, labels = states(6, 20, dtype=torch.float32)
    plain = DistillationLoss(SETTINGS, student_width=5, teacher_width=6)
    assert list(plain.parameters()) == []
    loss = DistillationLoss(LossSettings(hidden_weight=2), student_width=5, teacher_width=6)
    without = plain(hidden, head, teacher, teacher_head, labels)
    terms = loss(hidden, head, teacher, teacher_head, labels)
    error = mse_loss(loss.projection(hidden), teacher)
    torch.testing.assert_close(terms.loss, without.loss + 2 * error)
    torch.testing.assert_close(terms.named()["hidden"], error.detach())
    assert "hidden" not in without.named()
    terms.loss.backward()
    assert loss.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [-1, 8])
def test_a_label_outside_the_vocabulary_is_refused(bad):
    student, teacher, labels = random_case(3, 8)
    labels[1] = bad
    with pytest.raises(ValueError, match=f"label {bad} is outside the vocabulary of 8"):
        distillation_loss(student, teacher, labels, SETTINGS)


def test_other_shapes_and_no_positions_are_refused():
    student, teacher, labels = random_case(3, 8)
    with pytest.raises(ValueError, match=r"got \(3, 8\), \(3, 7\) and \(3,\)"):
        distillation_loss(student, teacher[:, :7], labels, SETTINGS)
    with pytest.raises(ValueError, match="positions must be > 0"):
        distillation_loss(student, teacher, labels, SETTINGS, positions=0)
    hidden, head, teacher, teacher_head, labels = states(3, 8)
    with pytest.raises(ValueError, match="expected"):
        distillation_loss_from_states(hidden, head, teacher, teacher_head[:, :4], labels, SETTINGS)
