import math

import pytest
import torch
from torch.nn.functional import normalize

from soju.sparse.terms.losses import in_batch_translation

KO, EN, OTHER = [1.0, 0.0], [0.6, 0.8], [0.0, 2.0]  # cosines: KO·EN 0.6, KO·OTHER 0, EN·OTHER 0.8
BATCH = torch.tensor([KO, EN, OTHER])
PARTNERS = torch.tensor([1, 0, -1])


def test_each_text_must_tell_its_translation_from_the_others():
    from_ko = math.log(math.exp(0.6) + math.exp(0.0)) - 0.6
    from_en = math.log(math.exp(0.6) + math.exp(0.8)) - 0.6
    loss = in_batch_translation(BATCH, PARTNERS, temperature=1.0)
    assert loss.item() == pytest.approx((from_ko + from_en) / 2)


def test_it_is_info_nce_of_the_library_without_self_pairs():
    torch.manual_seed(0)
    vectors = torch.rand(6, 9, dtype=torch.float64)
    partners = torch.tensor([1, 0, 3, 2, 5, 4])
    cosines = normalize(vectors) @ normalize(vectors).T / 0.05
    cosines.fill_diagonal_(-torch.inf)
    expected = torch.nn.functional.cross_entropy(cosines, partners)
    torch.testing.assert_close(in_batch_translation(vectors, partners), expected)


def test_gradient_is_that_of_finite_differences():
    vectors = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: in_batch_translation(v, PARTNERS, temperature=0.5), vectors)


def test_a_batch_without_translations_costs_nothing_and_still_has_a_gradient():
    vectors = BATCH.clone().requires_grad_()
    loss = in_batch_translation(vectors, torch.tensor([-1, -1, -1]))
    loss.backward()
    assert loss.item() == 0.0
    assert not vectors.grad.any()


@pytest.mark.parametrize(
    ("partners", "temperature", "what"),
    [([0, 1, -1], 0.1, "its own partner"), ([1, 0], 0.1, "same B"), ([1, 0, -1], 0.0, "temperature")],
)
def test_what_makes_no_sense_is_refused(partners, temperature, what):
    with pytest.raises(ValueError, match=what):
        in_batch_translation(BATCH, torch.tensor(partners), temperature=temperature)
