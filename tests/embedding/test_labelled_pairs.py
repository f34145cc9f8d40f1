"""Losses of labelled pairs: hand-worked values, the field's library, and the refusals."""

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss
from torch import nn

from soju.embedding.losses import cosent, cosine_score, cosines, entailment_contrast

COSINES = torch.tensor([0.2, 0.6])
FIRST = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
SECOND = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, -1.0]])
SCORES = torch.tensor([0.9, 0.4, 0.1])


def test_cosent_penalises_the_pair_in_the_wrong_order():
    wrong = cosent(COSINES, torch.tensor([1.0, 0.0]), temperature=0.5)  # 0.2 should be above 0.6
    assert wrong.item() == pytest.approx(math.log(1 + math.exp(0.8)))
    right = cosent(COSINES, torch.tensor([0.0, 1.0]), temperature=0.5)
    assert right.item() == pytest.approx(math.log(1 + math.exp(-0.8)))


def test_cosent_of_equal_scores_is_zero():
    assert cosent(COSINES, torch.tensor([0.5, 0.5])).item() == 0


class Given(nn.Module):
    """Stands for a model whose vectors are given."""

    def forward(self, features):
        return features

    def get_embedding_dimension(self):
        return 2


def test_both_losses_of_scores_are_those_of_sentence_transformers():
    features = [{"sentence_embedding": FIRST}, {"sentence_embedding": SECOND}]
    found = cosines(FIRST, SECOND)
    torch.testing.assert_close(cosent(found, SCORES, temperature=0.05), CoSENTLoss(Given())(features, SCORES))
    torch.testing.assert_close(cosine_score(found, SCORES), CosineSimilarityLoss(Given())(features, SCORES))


def test_entailment_is_found_among_all_hypotheses():
    entailed = torch.tensor([True, False, False])
    # cosines of the first premise with the three hypotheses: 1/sqrt(2), 0, 1/sqrt(2)
    near, far = math.exp(math.sqrt(0.5)), 1.0
    expected = -math.log(near / (near + far + near))
    found = entailment_contrast(FIRST, SECOND, entailed, temperature=1.0)
    assert found.item() == pytest.approx(expected)


def test_without_entailment_nothing_is_learned():
    first = FIRST.clone().requires_grad_()
    loss = entailment_contrast(first, SECOND, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(first.grad, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosent(COSINES, SCORES), "must be"),
        (lambda: cosent(COSINES, COSINES, temperature=0.0), "temperature"),
        (lambda: cosine_score(COSINES, SCORES), "must be"),
        (lambda: entailment_contrast(FIRST, SECOND, COSINES > 0), "must be"),
        (lambda: entailment_contrast(FIRST, SECOND, SCORES > 0, temperature=-1.0), "temperature"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
