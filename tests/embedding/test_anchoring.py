import math

import pytest
import torch

from soju.embedding.losses import anchor, contrastive_anchor

KOREAN = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
ENGLISH = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # cosines: 0.6 and 0.8 for the first, 1 and 0 for the second


def test_the_korean_vector_is_pulled_to_its_translation():
    assert anchor(KOREAN, ENGLISH).item() == pytest.approx(((1 - 0.6) + (1 - 0)) / 2)


def test_the_translation_must_be_told_from_the_other_sentences():
    first = math.log(math.exp(0.6) + math.exp(0.8)) - 0.6
    second = math.log(math.exp(1.0) + math.exp(0.0)) - 0.0
    assert contrastive_anchor(KOREAN, ENGLISH, temperature=1.0).item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("loss", [anchor, contrastive_anchor])
def test_the_english_side_gets_no_gradient(loss):
    korean, english = KOREAN.clone().requires_grad_(), ENGLISH.clone().requires_grad_()
    loss(korean, english).backward()
    assert korean.grad.any()
    assert english.grad is None


def test_they_are_the_losses_of_the_libraries():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    korean, english = torch.randn(5, 7), torch.randn(5, 7)
    ranking = MultipleNegativesRankingLoss(model=None, scale=20.0)
    torch.testing.assert_close(
        contrastive_anchor(korean, english), ranking.compute_loss_from_embeddings([korean, english], labels=None)
    )
    expected = 1 - torch.nn.functional.cosine_similarity(korean, english, dim=1)
    torch.testing.assert_close(anchor(korean, english), expected.mean())


@pytest.mark.parametrize("loss", [anchor, contrastive_anchor])
def test_the_gradient_is_that_of_finite_differences(loss):
    torch.manual_seed(1)
    korean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    english = torch.randn(3, 4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda v: loss(v, english), korean)


@pytest.mark.parametrize("loss", [anchor, contrastive_anchor])
def test_sides_that_do_not_fit_are_refused(loss):
    with pytest.raises(ValueError, match="same B >= 1"):
        loss(KOREAN, ENGLISH[:1])
    with pytest.raises(ValueError, match="temperature"):
        contrastive_anchor(KOREAN, ENGLISH, temperature=0.0)
