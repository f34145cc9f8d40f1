import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, linear

from soju.sparse import splade_head
from soju.sparse.splade_head import TiedEmbedding, offered_gradient, signed_maxima, sum_rows

TERMS, WIDTH = 9, 4
IDS = torch.tensor([[1, 3, 3, 0], [5, 1, 0, 0]])
OTHERS = torch.tensor([[8, 1, 2, 2], [3, 3, 3, 0]])
LENGTHS = torch.tensor([4, 4])


@pytest.fixture
def offers(monkeypatch):
    """Count which uses found a gradient to add to."""
    found = []

    def counted(weight):
        gradient = offered_gradient(weight)
        found.append(gradient is not None)
        return gradient

    monkeypatch.setattr(splade_head, "offered_gradient", counted)
    return found


def tied(padding_idx=None):
    torch.manual_seed(0)
    module = nn.Embedding(TERMS, WIDTH, padding_idx=padding_idx, dtype=torch.float64)
    nn.init.normal_(module.weight)
    return module


def ours(module, ids):
    """Return signed maxima, with the embedding tied to the output."""
    return signed_maxima(module(ids).tanh().flatten(0, 1), module.weight, None, LENGTHS)


def plain(module, ids):
    """Return the same from autograd's own operators."""
    hidden = embedding(ids, module.weight, module.padding_idx).tanh()
    return linear(hidden, module.weight).amax(dim=1)


def weight_gradient(head, combine, *, padding_idx=None):
    module = tied(padding_idx)
    if head is ours:
        module = TiedEmbedding(module)
    combine(lambda ids: head(module, ids).square().sum(), module.weight).backward()
    return module.weight.grad


USES = {
    "one batch": (lambda loss, weight: loss(IDS), [False, True]),
    "two batches": (lambda loss, weight: loss(IDS) * loss(OTHERS), [False, True, True, True]),
    "another use before": (lambda loss, weight: weight.square().sum() + loss(IDS), [False, True]),
    # Its gradient comes first, and autograd adds ours to it: there is nothing left to add to.
    "another use after": (lambda loss, weight: loss(IDS) + weight.square().sum(), [False, False]),
    "another use between": (
        lambda loss, weight: loss(IDS) + weight.square().sum() + loss(OTHERS),
        [False, True, True, True],
    ),
    "a use of the embedding alone": (lambda loss, weight: loss(IDS) + weight[OTHERS].square().sum(), [False, False]),
}


@pytest.mark.parametrize("cells", [1e-9, 1e9])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("use", USES)
def test_all_uses_add_up(monkeypatch, offers, use, padding_idx, cells):
    monkeypatch.setattr(splade_head, "CELLS_PER_ENTRY", cells)
    combine, found = USES[use]
    expected = weight_gradient(plain, combine, padding_idx=padding_idx)
    torch.testing.assert_close(weight_gradient(ours, combine, padding_idx=padding_idx), expected)
    assert offers == found


def test_gradients_accumulate_over_backward_passes(offers):
    module, expected = tied(), tied()
    module = TiedEmbedding(module)
    for ids in (IDS, OTHERS):
        ours(module, ids).sum().backward()
        plain(expected, ids).sum().backward()
    torch.testing.assert_close(module.weight.grad, expected.weight.grad)
    assert offers == [False, True, False, True]


def test_the_gradient_is_handed_over_not_copied(monkeypatch):
    made = []
    zeros = splade_head.lazy_zeros_like
    monkeypatch.setattr(
        splade_head, "lazy_zeros_like", lambda weight: [t := zeros(weight), made.append(t.data_ptr())][0]
    )
    module = tied()
    module = TiedEmbedding(module)
    (ours(module, IDS).sum() + ours(module, OTHERS).sum()).backward()
    assert made == [module.weight.grad.data_ptr()]


def test_asking_autograd_for_the_gradient_gives_the_same():
    module, expected = tied(), tied()
    module = TiedEmbedding(module)
    (found,) = torch.autograd.grad(ours(module, IDS).sum(), module.weight)
    torch.testing.assert_close(found, torch.autograd.grad(plain(expected, IDS).sum(), expected.weight)[0])


def test_hooks_see_the_whole_gradient():
    module, expected = tied(), tied()
    module = TiedEmbedding(module)
    seen = []
    for each, head in ((module, ours), (expected, plain)):
        each.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
        head(each, IDS).sum().backward()
    torch.testing.assert_close(seen[0], seen[1])


def test_another_weight_gets_nothing_of_it():
    module, other = tied(), tied()
    module = TiedEmbedding(module)
    other = TiedEmbedding(other)
    (ours(module, IDS).sum() + other(IDS).sum()).backward()
    torch.testing.assert_close(
        other.weight.grad, torch.zeros(TERMS, WIDTH).double().index_add(0, IDS.flatten(), torch.ones(8, 4).double())
    )


def test_nothing_is_offered_after_a_backward_pass():
    module = tied()
    module = TiedEmbedding(module)
    ours(module, IDS).sum().backward()
    assert offered_gradient(module.weight) is None
    module.weight.grad = None
    assert not splade_head._offers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast(dtype):
    module, expected = tied().to(dtype), tied().to(dtype)
    module = TiedEmbedding(module)
    with torch.autocast("cpu", torch.bfloat16):
        ours(module, IDS).sum().backward()
        plain(expected, IDS).sum().backward()
    assert module.weight.grad.dtype == dtype
    torch.testing.assert_close(module.weight.grad, expected.weight.grad, atol=0.1, rtol=0.05)


def test_looking_up_is_what_torch_does():
    module = tied(padding_idx=3)
    module = TiedEmbedding(module)
    assert torch.equal(module(IDS), embedding(IDS, module.weight))
    with torch.no_grad():
        assert torch.equal(module(IDS), embedding(IDS, module.weight))
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(module, {"weight": weight}, IDS[:, :1]), module.weight
    )


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_other_kinds_of_embedding_are_left_alone(options):
    assert not TiedEmbedding.can_replace(nn.Embedding(3, 2, **options))
    assert TiedEmbedding.can_replace(nn.Embedding(3, 2, padding_idx=1))


def test_values_of_equal_rows_are_added_up():
    rows, sums = sum_rows(torch.tensor([2, 2, 5]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert rows.tolist() == [2, 5]
    assert sums.tolist() == [[4.0, 6.0], [5.0, 6.0]]
