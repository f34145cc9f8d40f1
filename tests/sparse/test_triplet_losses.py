"""Losses of triplets against hand values, plain loops and sentence-transformers."""

import math

import pytest
import torch
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss
from torch.nn.functional import cosine_similarity

from soju.sparse.losses import RowTargets, TermTargets
from soju.sparse.triplets.losses import (
    effective_negatives,
    info_nce,
    listwise_distillation,
    margin_mse,
    minimum_activation,
    similarities,
    term_activation,
    triplet_margin,
)

NOTHING = torch.zeros(2, 4, dtype=torch.bool)


def random_sides(rows=5, terms=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, terms, generator=generator, dtype=torch.float64).sub(0.4).relu() for _ in range(3)]


def test_similarities_are_cosines_or_dot_products_and_a_dark_text_has_none():
    queries, candidates = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    torch.testing.assert_close(
        similarities(queries, candidates, similarity="cosine"), torch.tensor([[0.96, 0.6], [0.0, 0.0]])
    )
    torch.testing.assert_close(
        similarities(queries, candidates, similarity="dot"), torch.tensor([[24.0, 3.0], [0.0, 0.0]])
    )


def test_the_gradient_of_a_dark_text_is_finite():
    queries = torch.zeros(1, 3, requires_grad=True)
    similarities(queries, torch.ones(2, 3), similarity="cosine").sum().backward()
    assert torch.isfinite(queries.grad).all()


def test_info_nce_by_hand():
    scores = torch.tensor([[0.2, 0.0, 0.1, 0.0], [0.0, 0.1, 0.0, 0.3]])
    found = info_nce(scores, NOTHING, temperature=0.1)
    first = -2 + math.log(math.exp(2) + 1 + math.exp(1) + 1)
    second = -1 + math.log(1 + math.exp(1) + 1 + math.exp(3))
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-6)


def test_info_nce_is_that_of_sentence_transformers():
    query, positive, negative = random_sides()
    scores = similarities(query, torch.cat([positive, negative]), similarity="dot")
    ours = info_nce(scores, torch.zeros(5, 10, dtype=torch.bool), temperature=0.05)
    theirs = SparseMultipleNegativesRankingLoss(model=None, scale=20.0)
    torch.testing.assert_close(ours, theirs.compute_loss_from_embeddings([query, positive, negative], None))


def test_a_candidate_that_is_an_answer_is_no_negative():
    scores = torch.tensor([[0.2, 0.2, 0.0, 0.0], [0.0, 0.3, 0.0, 0.0]])
    same = NOTHING.clone()
    same[0, 1] = True
    own = math.log(math.exp(2) + 2) - 2
    other = math.log(math.exp(3) + 3) - 3
    assert float(info_nce(scores, same, temperature=0.1)) == pytest.approx((own + other) / 2, rel=1e-5)


def test_the_own_positive_counts_even_where_the_mask_names_it():
    scores = torch.rand(2, 4)
    same = torch.eye(2, 4, dtype=torch.bool)
    assert info_nce(scores, same, temperature=0.1) == info_nce(scores, NOTHING, temperature=0.1)


def test_effective_negatives_are_all_when_scores_are_equal_and_none_when_the_answer_is_clear():
    assert float(effective_negatives(torch.zeros(2, 4), NOTHING, temperature=1.0)) == pytest.approx(3.0)
    clear = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert float(effective_negatives(clear, NOTHING, temperature=0.01)) == pytest.approx(0.0, abs=1e-5)


def test_the_symmetric_form_also_finds_the_query_of_each_positive():
    scores = torch.tensor([[0.2, 0.0, 0.1, 0.0], [0.1, 0.1, 0.0, 0.3]])
    forward = info_nce(scores, NOTHING, temperature=0.1)
    back = (math.log(math.exp(2) + math.exp(1)) - 2 + math.log(1 + math.exp(1)) - 1) / 2
    both = info_nce(scores, NOTHING, temperature=0.1, symmetric=True)
    assert float(both) == pytest.approx((float(forward) + back) / 2, rel=1e-5)


@pytest.mark.parametrize(("scores", "mask"), [((2, 3), (2, 3)), ((2, 4), (2, 3)), ((0, 0), (0, 0))])
def test_info_nce_refuses_other_shapes(scores, mask):
    with pytest.raises(ValueError, match="2 B"):
        info_nce(torch.zeros(scores), torch.zeros(mask, dtype=torch.bool), temperature=1.0)


def test_info_nce_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.zeros(2, 4), NOTHING, temperature=0.0)


def test_the_triplet_margin_is_that_of_a_plain_loop():
    query, positive, negative = random_sides()
    scores = similarities(query, torch.cat([positive, negative]), similarity="cosine")
    expected = [
        max(0.0, 0.3 - float(cosine_similarity(q, p, dim=0)) + float(cosine_similarity(q, n, dim=0)))
        for q, p, n in zip(query, positive, negative, strict=True)
    ]
    assert float(triplet_margin(scores, margin=0.3)) == pytest.approx(sum(expected) / 5)


def test_the_published_margin_cannot_be_reached_by_vectors_that_are_not_negative():
    perfect = torch.tensor([[1.0, 0.0]])
    assert float(triplet_margin(perfect, margin=1.5)) == 0.5


MAXIMA = torch.tensor([[math.e - 1, -0.5, 0.0, 3.0], [0.0, -2.0, -1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
TERMS = TermTargets.from_rows([RowTargets([0, 1], [], []), RowTargets([1], [], []), RowTargets([], [], [])]).source


def test_published_activation_is_minus_the_mean_weight_and_leaves_dark_terms_alone():
    maxima = MAXIMA.clone().requires_grad_()
    loss = term_activation(maxima, TERMS, form="published", target=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 0.0) / 2)  # the third text has no term
    assert maxima.grad[0, 1] == 0
    assert maxima.grad[1, 1] == 0


def test_signed_activation_pulls_dark_terms_up_and_stops_at_the_target():
    maxima = MAXIMA.clone().requires_grad_()
    loss = term_activation(maxima, TERMS, form="signed", target=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(((0.0 + 1.5) / 2 + 3.0) / 2)
    assert maxima.grad[1, 1] == -0.5
    assert float(term_activation(torch.full((3, 4), 9.0), TERMS, form="signed", target=1.0)) == 0


def test_without_any_term_there_is_no_activation_loss():
    none = TermTargets.from_rows([RowTargets([], [], [])] * 3).source
    assert float(term_activation(MAXIMA, none, form="signed", target=1.0)) == 0


def test_minimum_activation_by_hand():
    # two heaviest weights: 1 and log 4; log 2 and 0; log 6 twice
    value = minimum_activation(MAXIMA, form="published", k=2, threshold=1.0)
    assert float(value) == pytest.approx((1.0 - math.log(2) / 2) / 3, rel=1e-5)


def test_a_collapsed_text_gets_a_gradient_only_in_the_signed_form():
    for form, pulled in (("published", False), ("signed", True)):
        maxima = torch.full((1, 6), -1.0, requires_grad=True)
        minimum_activation(maxima, form=form).backward()
        assert bool((maxima.grad < 0).any()) is pulled


def test_listwise_distillation_is_zero_for_equal_rankings_and_ignores_what_the_teacher_does_not_know():
    scores = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.7, 0.3]])
    known = torch.tensor([[True, True, False], [True, True, True]])
    teacher = scores.clone()
    teacher[0, 2] = 123.0
    args = {"temperature": 0.1, "teacher_temperature": 0.1}
    assert float(listwise_distillation(scores, teacher, known, **args)) == pytest.approx(0.0, abs=1e-6)
    assert float(listwise_distillation(scores, -teacher, known, **args)) > 0.1


def test_listwise_distillation_by_hand():
    scores, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    known = torch.ones(1, 2, dtype=torch.bool)
    found = listwise_distillation(scores, teacher, known, temperature=1.0, teacher_temperature=1.0)
    assert float(found) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)


def test_a_teacher_that_knows_at_most_one_candidate_teaches_nothing():
    scores = torch.rand(2, 4, requires_grad=True)
    loss = listwise_distillation(
        scores, torch.rand(2, 4), torch.eye(2, 4, dtype=torch.bool), temperature=1.0, teacher_temperature=1.0
    )
    loss.backward()
    assert loss.item() == 0


def test_margin_mse_by_hand_over_the_rows_that_are_known():
    scores = torch.tensor([[0.9, 0.0, 0.4, 0.0], [0.0, 0.8, 0.0, 0.7]])
    found = margin_mse(scores, torch.tensor([0.2, 99.0]), torch.tensor([True, False]))
    assert float(found) == pytest.approx((0.5 - 0.2) ** 2, rel=1e-5)
    assert float(margin_mse(scores, torch.zeros(2), torch.zeros(2, dtype=torch.bool))) == 0


def test_gradients_are_those_of_finite_differences():
    def total(query, positive, negative):
        scores = similarities(query, torch.cat([positive, negative]), similarity="cosine")
        found = info_nce(scores, torch.zeros(3, 6, dtype=torch.bool), temperature=0.5, symmetric=True)
        return found + triplet_margin(scores, margin=0.3)

    sides = [torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    assert torch.autograd.gradcheck(total, [side.add(0.1).requires_grad_() for side in sides])
