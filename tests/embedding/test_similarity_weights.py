import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from soju.embedding.expansion import initialise as module
from soju.embedding.expansion.initialise import similarity_weights, sparsemax_of_sorted


def test_sparsemax_by_hand():
    # 0.9 and 0.7 are within reach of each other: threshold (1.6 - 1) / 2 = 0.3; 0.1 is below it.
    torch.testing.assert_close(sparsemax_of_sorted(torch.tensor([[0.9, 0.7, 0.1]])), torch.tensor([[0.6, 0.4, 0.0]]))
    torch.testing.assert_close(sparsemax_of_sorted(torch.tensor([[2.0, 0.5]])), torch.tensor([[1.0, 0.0]]))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30))
def test_sparsemax_is_the_closest_point_of_the_simplex(scores):
    scores = np.sort(np.array(scores))[::-1]
    weights = sparsemax_of_sorted(torch.tensor(scores.copy())[None])[0].numpy()
    assert abs(weights.sum() - 1) < 1e-9
    # The condition for a projection on the simplex: moving weight to any other place only goes further away.
    gradient = scores - weights
    assert (gradient[weights > 0] >= gradient.max() - 1e-9).all()


def test_looking_at_few_cosines_gives_the_weights_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    targets, anchors = torch.randn(5, 3, generator=generator), torch.randn(60, 3, generator=generator)
    index, weight = similarity_weights(targets, anchors)
    monkeypatch.setattr(module, "FIRST_LOOK", 2)
    other_index, other_weight = similarity_weights(targets, anchors)
    assert torch.equal(index, other_index)
    torch.testing.assert_close(weight, other_weight)
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(5))
    assert weight.shape[1] > 2


def test_lengths_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    targets, anchors = torch.randn(5, 3, generator=generator), torch.randn(20, 3, generator=generator)
    torch.testing.assert_close(
        similarity_weights(targets, anchors)[1], similarity_weights(9 * targets, 0.1 * anchors)[1]
    )
