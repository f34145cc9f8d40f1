import math

import pytest
import torch
from torch.nn.functional import kl_div, normalize

from soju.sparse.terms.losses import in_batch_distillation


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_texts_worked_by_hand():
    """The teacher finds them the same (halves), the student unrelated (e to 1): KL = ln((e + 1) / 2 / sqrt(e))."""
    student = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    teacher = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    expected = math.log((math.e + 1) / 2) - 0.5
    loss = in_batch_distillation(student, teacher, temperature=1.0)
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_it_equals_torch_kl_div_over_normalised_vectors(temperature):
    student, teacher = drawn(5, 7).relu(), drawn(5, 3, seed=1)
    similarities = [normalize(side) @ normalize(side).T / temperature for side in (student, teacher)]
    expected = kl_div(similarities[0].log_softmax(1), similarities[1].softmax(1), reduction="batchmean")
    torch.testing.assert_close(in_batch_distillation(student, teacher, temperature=temperature), expected)


def test_its_gradient_agrees_with_finite_differences():
    teacher = drawn(4, 3, seed=1)
    student = drawn(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda vectors: in_batch_distillation(vectors, teacher, temperature=0.5), student)


def test_it_is_zero_when_the_student_sees_what_the_teacher_sees():
    vectors = drawn(6, 4)
    rotated = torch.cat([vectors, torch.zeros(6, 2)], dim=1).flip(1) * 3
    assert in_batch_distillation(rotated, vectors).item() == pytest.approx(0, abs=1e-9)


def test_zero_vectors_are_unlike_everything_and_get_no_gradient():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]], requires_grad=True)
    loss = in_batch_distillation(student, drawn(3, 4).float())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert not student.grad[1].any()
    assert student.grad[0].any()


def test_a_batch_of_zero_vectors_is_finite():
    student = torch.zeros(2, 3, requires_grad=True)
    loss = in_batch_distillation(student, torch.eye(2))
    loss.backward()
    assert torch.isfinite(loss)
    assert not student.grad.any()


def test_no_gradient_reaches_the_teacher():
    teacher = torch.eye(2, requires_grad=True)
    in_batch_distillation(torch.ones(2, 3, requires_grad=True), teacher).backward()
    assert teacher.grad is None


def test_autocast_does_not_round_it():
    student, teacher = drawn(8, 32).float(), drawn(8, 16, seed=1).float()
    exact = in_batch_distillation(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_batch_distillation(student, teacher), exact)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2,), (2, 3)), ((0, 3), (0, 2))])
def test_vectors_of_different_batches_are_refused(shapes):
    with pytest.raises(ValueError, match="same B >= 1"):
        in_batch_distillation(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        in_batch_distillation(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)
