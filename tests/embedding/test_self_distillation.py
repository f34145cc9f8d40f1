import pytest
import torch
from torch.nn.functional import cosine_similarity

from soju.embedding.losses import NOWHERE, aligned_states, last_old_positions, pooled_distillation, state_distillation

# One text of four old tokens becomes two new ones, (0, 1, 2) and (3); the third place is padding.
OLD = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [4.0, 0.0]]])
LAST = torch.tensor([[2, 3, NOWHERE]])
NEW = torch.tensor([[[0.0, 1.0], [4.0, 2.0], [9.0, 9.0]]])


def test_the_teacher_speaks_at_the_last_old_token_of_each_new_one():
    assert aligned_states(OLD, LAST).tolist() == [[[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]]]


def test_padding_that_is_not_a_number_does_not_get_out():
    states = torch.tensor([[[float("nan")], [2.0]]])  # left padding, of which attention made no number
    assert aligned_states(states, torch.tensor([[NOWHERE, 1]])).tolist() == [[[0.0], [2.0]]]


def test_positions_follow_from_how_many_old_tokens_are_joined():
    assert last_old_positions(torch.tensor([[3, 1, 0], [1, 1, 2]])).tolist() == [[2, 3, NOWHERE], [0, 1, 3]]


def test_under_left_padding_positions_start_after_it():
    lengths = torch.tensor([[0, 3, 1], [1, 1, 4]])
    starts = torch.tensor([2, 0])  # six old places: the first text has four tokens, the second six
    assert last_old_positions(lengths, start_B=starts).tolist() == [[NOWHERE, 4, 5], [0, 1, 5]]


def test_squared_distance_is_measured_in_squares_of_the_teacher():
    first = (2.0**2 / 2) / (3.0**2 / 2)
    second = (2.0**2 / 2) / (4.0**2 / 2)
    assert state_distillation(NEW, OLD, LAST).item() == pytest.approx((first + second) / 2)


def test_a_loop_over_tokens_gives_the_same():
    torch.manual_seed(0)
    old, new = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    last = last_old_positions(torch.tensor([[2, 1, 3, 0, 0], [1, 1, 1, 1, 1], [0, 4, 2, 2, 1]]))
    terms = []
    for text in range(3):
        for token in range(5):
            if last[text, token] == NOWHERE:
                continue
            ours, theirs = new[text, token], old[text, last[text, token]]
            terms.append((ours - theirs).square().mean() / theirs.square().mean())
    loss = state_distillation(new, old, last)
    assert len(terms) == 12
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item())


def test_padding_gets_no_gradient_and_neither_does_the_teacher():
    new, old = NEW.clone().requires_grad_(), OLD.clone().requires_grad_()
    state_distillation(new, old, LAST).backward()
    assert not new.grad[0, 2].any()
    assert new.grad[0, :2].any()
    assert old.grad is None


def test_more_padding_changes_nothing():
    wider = torch.cat([NEW, torch.full((1, 4, 2), 7.0)], dim=1)
    last = torch.cat([LAST, torch.full((1, 4), NOWHERE)], dim=1)
    torch.testing.assert_close(state_distillation(wider, OLD, last), state_distillation(NEW, OLD, LAST))


def test_a_student_that_says_the_same_costs_nothing():
    same = aligned_states(OLD, LAST)
    assert state_distillation(same, OLD, LAST).item() == 0.0


def test_a_batch_of_padding_alone_costs_nothing_and_still_has_a_gradient():
    new = NEW.clone().requires_grad_()
    loss = state_distillation(new, OLD, torch.full((1, 3), NOWHERE))
    loss.backward()
    assert loss.item() == 0.0
    assert not new.grad.any()


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(1)
    old, new = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    last = torch.tensor([[1, 3, 5, NOWHERE], [0, 1, 2, 3]])
    torch.autograd.gradcheck(lambda v: state_distillation(v, old, last), new)
    torch.autograd.gradcheck(lambda v: pooled_distillation(v, old[:, 0]), new[:, 0].detach().requires_grad_())


def test_pooled_vectors_are_pulled_by_their_direction():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 1.0]])
    assert pooled_distillation(student, teacher).item() == pytest.approx((0 + 1) / 2)
    expected = 1 - cosine_similarity(student, teacher, dim=1)
    torch.testing.assert_close(pooled_distillation(student, teacher), expected.mean())


def test_what_vectors_are_pulled_to_gets_no_gradient():
    student, teacher = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[1.0, 0.0]], requires_grad=True)
    pooled_distillation(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda: aligned_states(OLD, torch.tensor([[4, 0, 0]])), "below 4, the old tokens"),
        (lambda: aligned_states(OLD, torch.tensor([[-2, 0, 0]])), "positions must be -1"),
        (lambda: aligned_states(OLD[0], LAST), r"\(B, S, H\) and \(B, T\)"),
        (lambda: last_old_positions(torch.tensor([[1, -1]])), "fewer than 0"),
        (lambda: state_distillation(NEW[:, :2], OLD, LAST), r"must be \(B, T, H\)"),
        (lambda: pooled_distillation(NEW[0], NEW[0, :2]), "same B >= 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(act, what):
    with pytest.raises(ValueError, match=what):
        act()
