import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder.losses import FlopsLoss

from soju.sparse.losses import flops, idf_term_cost

WEIGHTS = torch.tensor([[2.0, 0.0, 1.0], [4.0, 0.0, 3.0]])  # term means: 3, 0, 2
IDF = torch.tensor([1.0, 2.0, 4.0])  # term 0 is the commonest
INVERSE, DIRECT = [12 / 7, 6 / 7, 3 / 7], [3 / 7, 6 / 7, 12 / 7]


def test_flops_is_the_sum_of_squared_term_means():
    torch.testing.assert_close(flops(WEIGHTS), torch.tensor(13.0))


def test_flops_weighs_term_means_by_cost_before_squaring():
    cost = torch.tensor([1.0, 5.0, 0.5])
    torch.testing.assert_close(flops(WEIGHTS, term_cost_V=cost), torch.tensor(10.0))


def test_flops_gradient_is_twice_cost_squared_times_mean_over_texts():
    weights = WEIGHTS.clone().requires_grad_()
    flops(weights, term_cost_V=torch.tensor([1.0, 1.0, 0.5])).backward()
    torch.testing.assert_close(weights.grad, torch.tensor([[3.0, 0.0, 0.5]] * 2))


def test_flops_is_lower_when_texts_use_different_terms():
    assert flops(torch.eye(3)) < flops(torch.tensor([[1.0, 0.0, 0.0]] * 3))


@given(st.lists(st.lists(st.floats(0, 8, width=32), min_size=3, max_size=3), min_size=1, max_size=5).map(torch.tensor))
def test_flops_equals_the_loss_of_sentence_transformers(weights):
    torch.testing.assert_close(flops(weights), FlopsLoss(model=None).compute_loss_from_embeddings(weights))


def test_flops_of_half_precision_weights_sums_in_single_precision():
    weights = torch.full((300, 2), 300.0, dtype=torch.float16)  # their sum, 90,000, is no float16
    torch.testing.assert_close(flops(weights), torch.tensor(180_000.0))


def test_flops_gradient_agrees_with_finite_differences():
    weights = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.autograd.gradcheck(flops, weights.requires_grad_())


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 2, 3)])
def test_flops_refuses_what_is_no_batch(shape):
    with pytest.raises(ValueError, match=r"\(B, V\)"):
        flops(torch.zeros(shape))


def test_flops_refuses_costs_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"term_cost_V must be \(3,\)"):
        flops(WEIGHTS, term_cost_V=torch.ones(4))


@pytest.mark.parametrize(("form", "expected"), [("inverse", INVERSE), ("direct", DIRECT)])
def test_idf_costs_have_mean_1(form, expected):
    torch.testing.assert_close(idf_term_cost(IDF, form=form), torch.tensor(expected))


def test_inverse_idf_makes_the_common_term_dearer_and_direct_the_rare_one():
    common, rare = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    inverse, direct = idf_term_cost(IDF), idf_term_cost(IDF, form="direct")
    assert flops(common, term_cost_V=inverse) > flops(rare, term_cost_V=inverse)
    assert flops(common, term_cost_V=direct) < flops(rare, term_cost_V=direct)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_idf_cost_refuses_unusable_idf_and_names_the_term(bad):
    with pytest.raises(ValueError, match=r"idf of term 1 .* smooth it first"):
        idf_term_cost(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(("idf", "form"), [(torch.ones(0), "inverse"), (torch.ones(2, 2), "inverse"), (IDF, "inv")])
def test_idf_cost_refuses_other_shapes_and_forms(idf, form):
    with pytest.raises(ValueError, match="must be"):
        idf_term_cost(idf, form=form)
