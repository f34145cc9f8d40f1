import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.reference_terms import row_by_row
from soju.sparse.losses import RowTargets, TermTargets, signed_weights
from soju.sparse.terms.losses import signed_terms, v19_terms

E = math.e
# Three texts over five terms; the second has no Korean targets, the third no English ones.
WEIGHTS = torch.tensor(
    [
        [1.0, E, 0.5, 4.0, 1.0],
        [E**2, 1.0, 1.0, 1.0, 0.5],
        [1.0, 1.0, E, 3.0, 1.0],
    ]
)
ROWS = [
    RowTargets(source=[0, 1], korean=[(1, 0.5), (2, 0.5)], english=[(3, 0.75), (4, 0.25)]),
    RowTargets(source=[0], korean=[], english=[(4, 1.0)]),
    RowTargets(source=[3], korean=[(2, 0.9)], english=[]),
]
LN2 = math.log(2)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_the_published_losses_of_three_texts_worked_by_hand():
    losses = v19_terms(WEIGHTS, TermTargets.from_rows(ROWS))
    # text 0: (-ln 1 - ln e) / 2 = -1/2, hinges (1 + 0) / 2; text 1: -ln e^2, no hinge; text 2: -ln 3, no hinge; 3 texts
    close(losses.self_, (-0.5 + 0.5 - 2 - math.log(3)) / 3)
    # text 0: (-ln e - ln 0.5) / 2; text 2: -ln e; all 3 texts count
    close(losses.korean, ((-1 + LN2) / 2 - 1) / 3)
    # text 0: 0.75 * -ln 4 + 0.25 * -ln 1; text 1: -ln 0.5; the 2 texts with English count
    close(losses.english, (0.75 * -2 * LN2 + LN2) / 2)
    # Korean, margin 2: text 0 (0 + 1.5) / 2, text 2 nothing; English, margin 3: text 0 0.25 * 2, text 1 2.5; 3 texts
    close(losses.margin, (0.75 + 0.5 + 2.5) / 3)


def test_the_signed_losses_worked_by_hand():
    maxima = torch.tensor([[0.0, -3.0, E - 1]])  # signed weights 0, -3, 1
    targets = TermTargets.from_rows([RowTargets(source=[0], korean=[(1, 0.3)], english=[(2, 0.8)])])
    losses = signed_terms(maxima, targets)
    close(losses.self_, LN2 + 2)  # softplus(0) and a hinge of 2
    close(losses.korean, math.log1p(E**3))
    close(losses.english, math.log1p(1 / E))
    close(losses.margin, 5.0 + 2.0)


def test_losses_go_by_their_published_names():
    named = v19_terms(WEIGHTS, TermTargets.from_rows(ROWS)).named()
    assert list(named) == ["self", "korean", "english", "margin"]


def batches(smallest, largest):
    """Batches of values with targets, ids unique within a kind."""

    def with_size(shape):
        terms = st.integers(0, shape[1] - 1)
        similarity = st.floats(0.0625, 1.0, width=32)
        weighted = st.dictionaries(terms, similarity, max_size=4).map(lambda found: list(found.items()))
        row = st.builds(RowTargets, st.lists(terms, unique=True, max_size=4), weighted, weighted)
        value = st.floats(smallest, largest, width=32).filter(bool)  # the slope at 0 is a convention
        values = st.lists(
            st.lists(value, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(torch.tensor)
        return st.tuples(values, st.lists(row, min_size=shape[0], max_size=shape[0]))

    return st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(with_size)


def values_and_gradients(losses, values):
    gradients = {
        name: torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)[0]
        for name, loss in losses.items()
        if loss.requires_grad
    }
    zero = torch.zeros_like(values)
    return losses, {name: zero if gradients.get(name) is None else gradients[name] for name in losses}


def assert_equal_to_the_reference(values_BV, rows, *, signed):
    fast, slow = values_BV.clone().requires_grad_(), values_BV.double().requires_grad_()
    ours = (signed_terms if signed else v19_terms)(fast, TermTargets.from_rows(rows)).named()
    losses, gradients = values_and_gradients(ours, fast)
    expected, expected_gradients = values_and_gradients(row_by_row(slow, rows, signed=signed), slow)
    for name in expected:
        torch.testing.assert_close(losses[name].double(), expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[name].double(), expected_gradients[name], rtol=1e-5, atol=1e-5)


@given(batches(0.0625, 8.0))
def test_published_losses_and_gradients_equal_the_row_by_row_reference(batch):
    assert_equal_to_the_reference(*batch, signed=False)


@given(batches(-8.0, 8.0))
def test_signed_losses_and_gradients_equal_the_row_by_row_reference(batch):
    assert_equal_to_the_reference(*batch, signed=True)


@given(batches(0.0625, 8.0))
def test_the_order_of_texts_and_of_targets_changes_nothing(batch):
    values_BV, rows = batch
    reordered = [RowTargets(row.source[::-1], row.korean[::-1], row.english[::-1]) for row in reversed(rows)]
    losses = v19_terms(values_BV, TermTargets.from_rows(rows))
    again = v19_terms(values_BV.flip(0), TermTargets.from_rows(reordered))
    torch.testing.assert_close(torch.stack(again), torch.stack(losses))


@given(batches(-8.0, 8.0))
def test_signed_gradients_are_finite_everywhere(batch):
    values_BV = batch[0].requires_grad_()
    sum(signed_terms(values_BV, TermTargets.from_rows(batch[1]))).backward()
    assert torch.isfinite(values_BV.grad).all()


def test_the_known_flaw_a_dark_target_gets_no_gradient_in_v19_and_one_in_signed():
    rows = [RowTargets(source=[0], korean=[(0, 1.0)], english=[(1, 1.0)])]
    targets = TermTargets.from_rows(rows)
    for loss_of, on_weights, wakes in ((v19_terms, True, False), (signed_terms, False, True)):
        maxima = torch.tensor([[1.0, -0.5]], requires_grad=True)
        losses = loss_of(torch.log1p(torch.relu(maxima)) if on_weights else maxima, targets)
        assert losses.english > 0
        (losses.english + losses.margin).backward()
        assert maxima.grad[0, 0] < 0
        assert (maxima.grad[0, 1] < 0) == wakes


@pytest.mark.parametrize("start", [-20.0, -1.0, 0.0, 1.0])
def test_the_pull_of_the_signed_loss_on_one_target_is_between_0_and_2(start):
    maxima = torch.full((1, 1), start, requires_grad=True)
    losses = signed_terms(maxima, TermTargets.from_rows([RowTargets([], [(0, 0.4)], [])]))
    (losses.korean + losses.margin).backward()
    assert -2 <= maxima.grad.item() < -0.5


def test_signed_weights_are_continuous_with_slope_1_at_0():
    maxima = torch.tensor([-2.0, -1e-6, 0.0, 1e-6, E - 1], requires_grad=True)
    weights = signed_weights(maxima)
    close(weights, [-2.0, -1e-6, 0.0, 1e-6, 1.0])
    weights.sum().backward()
    close(maxima.grad, [1.0, 1.0, 1.0, 1 - 1e-6, 1 / E])


def test_signed_weights_of_very_negative_maxima_have_no_nan_gradient():
    maxima = torch.tensor([-3e38, 3e38], requires_grad=True)
    signed_weights(maxima).sum().backward()
    assert maxima.grad.tolist() == [1.0, pytest.approx(0.0)]


def test_an_id_named_twice_counts_once_with_its_largest_similarity():
    twice = TermTargets.from_rows([RowTargets([2, 2], [(1, 0.4), (0, 0.5), (1, 0.75)], [])])
    assert twice.source.ids_T.tolist() == [2]
    assert list(zip(twice.korean.ids_T.tolist(), twice.korean.similarities_T.tolist(), strict=True)) == [
        (1, 0.75),
        (0, 0.5),
    ]


def test_a_term_may_be_own_token_and_target_at_once():
    rows = [RowTargets([0], [(0, 0.5)], [(0, 0.25)])]
    assert_equal_to_the_reference(torch.tensor([[1.5, 1.0]]), rows, signed=False)


def test_a_batch_without_targets_costs_nothing_and_differentiates():
    values = torch.ones(2, 3, requires_grad=True)
    losses = v19_terms(values, TermTargets.from_rows([RowTargets([], [], [])] * 2))
    assert [loss.item() for loss in losses] == [0, 0, 0, 0]
    sum(losses).backward()
    assert not values.grad.any()


def test_half_precision_maxima_give_losses_in_single_precision():
    losses = signed_terms(WEIGHTS.half(), TermTargets.from_rows(ROWS))
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.testing.assert_close(
        torch.stack(losses), torch.stack(signed_terms(WEIGHTS, TermTargets.from_rows(ROWS))), atol=2e-3, rtol=1e-3
    )


def test_targets_move_to_a_device_whole():
    moved = TermTargets.from_rows(ROWS).to("meta")
    tensors = [part for kind in (moved.source, moved.korean, moved.english) for part in (kind.rows_T, kind.ids_T)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.rows == 3


@pytest.mark.parametrize("similarity", [0.0, -0.5, float("nan"), float("inf")])
def test_a_similarity_that_is_no_share_is_refused(similarity):
    with pytest.raises(ValueError, match="finite > 0"):
        TermTargets.from_rows([RowTargets([], [(1, similarity)], [])])


@pytest.mark.parametrize("shape", [(2, 5), (3,), (3, 5, 1)])
def test_weights_of_other_texts_than_the_targets_are_refused(shape):
    with pytest.raises(ValueError, match="targets of 3 texts"):
        v19_terms(torch.ones(shape), TermTargets.from_rows(ROWS))
