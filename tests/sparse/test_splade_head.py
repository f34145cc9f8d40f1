import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode

from soju.sparse import splade_head, splade_loops
from soju.sparse.splade import keep_largest, sparse_weights
from soju.sparse.splade_head import TileReducer, padded_rows, signed_maxima, splade_weights, tile_width, tiles

# Three tokens of width 1 in two texts; two terms, the second the opposite of the first.
HIDDEN = torch.tensor([[1.0], [3.0], [-2.0]])
WEIGHT = torch.tensor([[1.0], [-1.0]])
BIAS = torch.tensor([0.5, 0.0])
LENGTHS = torch.tensor([2, 1])
MAXIMA = torch.tensor([[3.5, -1.0], [-1.5, 2.0]])

LOOPS, TORCH, DENSE = "loops", "torch", "dense"


@pytest.fixture(params=[LOOPS, TORCH, DENSE])
def path(request, monkeypatch):
    """Take one of the ways to the same numbers: the CPU's loops, the operators of other devices, dense products."""
    cells = 1e9 if request.param == DENSE else 1e-9
    monkeypatch.setattr(splade_head, "CELLS_PER_ENTRY", cells)
    monkeypatch.setattr(splade_head, "CELLS_PER_ENTRY_WITH_TORCH", cells)
    if request.param == TORCH:
        monkeypatch.setattr(splade_loops, "usable", lambda tensor: False)
    return request.param


def factors(texts, longest, width, terms, *, seed, dtype=torch.float64, empty=False):
    """Draw what a head is called with: padded hidden states, their mask, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(0 if empty else 1, longest + 1, (texts,), generator=generator)
    lengths_B[seed % texts] = longest
    mask_BS = (torch.arange(longest) < lengths_B[:, None]).long()
    hidden_BSH, weight_VH, bias_V = (
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((texts, longest, width), (terms, width), (terms,))
    )
    return hidden_BSH, weight_VH, bias_V, mask_BS


def ours(hidden_BSH, weight_VH, bias_V, mask_BS, **options):
    return signed_maxima(hidden_BSH[mask_BS.bool()], weight_VH, bias_V, mask_BS.sum(1), **options)


def stock(hidden_BSH, weight_VH, bias_V, mask_BS):
    """Return the weights sentence-transformers makes of padded logits."""
    features = {"token_embeddings": linear(hidden_BSH, weight_VH, bias_V), "attention_mask": mask_BS}
    return SpladePooling("max").train()(features)["sentence_embedding"]


def gradients(output, inputs, gradient):
    return torch.autograd.grad(output, inputs, gradient)


def test_the_maximum_is_signed_and_its_gradient_reaches_the_token_that_has_it():
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS))
    maxima = signed_maxima(hidden, weight, bias, LENGTHS)
    torch.testing.assert_close(maxima, MAXIMA)
    maxima.backward(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    # Text 0: term 0 from token 1, term 1 from token 0. Text 1 has only token 2.
    torch.testing.assert_close(hidden.grad, torch.tensor([[-10.0], [1.0], [100.0 - 1000.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[3.0 - 200.0], [10.0 - 2000.0]]))
    torch.testing.assert_close(bias.grad, torch.tensor([101.0, 1010.0]))


def test_weights_are_the_log_of_one_and_what_is_positive():
    maxima = MAXIMA.clone().requires_grad_()
    weights = splade_weights(maxima)
    torch.testing.assert_close(weights, torch.tensor([[4.5, 1.0], [1.0, 3.0]]).log())
    weights.sum().backward()
    torch.testing.assert_close(maxima.grad, torch.tensor([[1 / 4.5, 0.0], [0.0, 1 / 3]]))


def test_an_inactive_term_learns_through_its_signed_maximum_and_not_through_its_weight():
    hidden = HIDDEN.clone().requires_grad_()
    maxima = signed_maxima(hidden, WEIGHT, BIAS, LENGTHS)
    assert maxima[1, 0] < 0
    (through_weight,) = torch.autograd.grad(splade_weights(maxima)[1, 0], hidden, retain_graph=True)
    (through_maximum,) = torch.autograd.grad(maxima[1, 0], hidden)
    assert through_weight.abs().sum() == 0
    torch.testing.assert_close(through_maximum, torch.tensor([[0.0], [0.0], [1.0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [None, 4])
def test_gradients_are_those_of_finite_differences(path, bias, tile):
    hidden_BSH, weight_VH, bias_V, mask_BS = factors(3, 4, 5, 11, seed=1, empty=True)
    inputs = (hidden_BSH, weight_VH, *([bias_V] if bias else []))

    def head(hidden, weight, bias=None):
        maxima = ours(hidden, weight, bias, mask_BS, tile=tile)
        return maxima, splade_weights(maxima)

    assert torch.autograd.gradcheck(head, inputs)


@pytest.mark.parametrize("seed", range(8))
def test_values_and_gradients_are_those_of_sentence_transformers(path, seed):
    generator = np.random.default_rng(seed)
    texts, longest, width, terms = (
        int(generator.integers(low, high)) for low, high in ((1, 9), (1, 9), (1, 33), (1, 90))
    )
    *inputs, mask_BS = factors(texts, longest, width, terms, seed=seed, empty=seed % 2 == 1)
    expected = stock(*inputs, mask_BS)
    found = splade_weights(ours(*inputs, mask_BS, tile=int(generator.integers(1, terms + 1))))
    torch.testing.assert_close(found, expected)
    gradient = torch.from_numpy(generator.normal(size=expected.shape) * (generator.random(expected.shape) < 0.3))
    for one, other in zip(gradients(found, inputs, gradient), gradients(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_of_equal_tokens_gets_the_gradient_as_with_torch_max(path):
    token = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    hidden_BSH = torch.cat([token * 0.5, token, token, token])[None].requires_grad_()
    weight_VH = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    mask_BS = torch.ones(1, 4, dtype=torch.long)
    for head in (lambda *given: splade_weights(ours(*given)), stock):
        (found,) = gradients(head(hidden_BSH, weight_VH, None, mask_BS).sum(), [hidden_BSH], None)
        assert found[0].abs().sum(dim=1).nonzero().flatten().tolist() == [1]


def test_texts_without_tokens_have_no_weights_and_no_gradients(path):
    weight = WEIGHT.clone().requires_grad_()
    bias = BIAS.clone().requires_grad_()
    maxima = signed_maxima(HIDDEN, weight, bias, torch.tensor([0, 2, 0, 1, 0]))
    torch.testing.assert_close(
        maxima, torch.stack([torch.zeros(2), MAXIMA[0], torch.zeros(2), MAXIMA[1], torch.zeros(2)])
    )
    maxima[::2].sum().backward()
    assert weight.grad.abs().sum() == bias.grad.abs().sum() == 0
    nothing = signed_maxima(HIDDEN[:0], weight, bias, torch.tensor([0, 0]))
    assert nothing.tolist() == [[0, 0], [0, 0]]


def test_a_batch_of_no_texts_gives_no_rows(path):
    weight = WEIGHT.clone().requires_grad_()
    maxima = signed_maxima(HIDDEN[:0], weight, BIAS, torch.tensor([], dtype=torch.long))
    assert maxima.shape == (0, 2)
    maxima.sum().backward()
    assert weight.grad.tolist() == [[0.0], [0.0]]


def test_not_a_number_is_passed_on_for_its_text_only(path):
    maxima = signed_maxima(torch.tensor([[1.0], [float("nan")], [-2.0]]), WEIGHT, BIAS, LENGTHS)
    assert maxima.isnan().tolist() == [[True, True], [False, False]]


def test_a_tied_embedding_gets_the_sum_of_both_gradients():
    _, weight_VH, bias_V, mask_BS = factors(3, 5, 8, 20, seed=3)
    ids_BS = torch.randint(0, 20, mask_BS.shape, generator=torch.Generator().manual_seed(0))

    def gradient(head):
        return gradients(head(embedding(ids_BS, weight_VH).tanh(), weight_VH, bias_V, mask_BS).sum(), [weight_VH], None)

    torch.testing.assert_close(gradient(lambda *given: splade_weights(ours(*given))), gradient(stock))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_factor_that_needs_no_gradient_costs_none(path, frozen):
    *inputs, mask_BS = factors(3, 4, 5, 11, seed=2)
    expected = gradients(ours(*inputs, mask_BS).sum(), inputs, None)
    inputs[frozen] = inputs[frozen].detach()
    wanted = [i for i in range(3) if i != frozen]
    found = gradients(ours(*inputs, mask_BS).sum(), [inputs[i] for i in wanted], None)
    torch.testing.assert_close(found, tuple(expected[i] for i in wanted))


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_all_ways_give_the_same_gradients(monkeypatch, share):
    *inputs, mask_BS = factors(4, 6, 16, 300, seed=5)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    gradient *= torch.rand(4, 300, generator=generator) < share
    found = {}
    for cells, usable in ((1e-9, True), (1e9, True), (1e-9, False), (1e9, False)):
        monkeypatch.setattr(splade_head, "CELLS_PER_ENTRY", cells)
        monkeypatch.setattr(splade_head, "CELLS_PER_ENTRY_WITH_TORCH", cells)
        monkeypatch.setattr(splade_loops, "usable", lambda tensor, usable=usable: usable)
        found[cells, usable] = gradients(ours(*inputs, mask_BS, tile=64), inputs, gradient)
    first, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, first)


def test_gathering_in_steps_gives_the_same_sums(monkeypatch):
    monkeypatch.setattr(splade_loops, "usable", lambda tensor: False)
    *inputs, mask_BS = factors(4, 6, 8, 50, seed=6)
    whole = gradients(ours(*inputs, mask_BS).sum(), inputs, None)
    monkeypatch.setattr(splade_head, "GATHERED_NUMBERS", 24)  # three entries a step
    torch.testing.assert_close(gradients(ours(*inputs, mask_BS).sum(), inputs, None), whole)


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_the_same_bits_every_time_and_with_any_number_of_threads(monkeypatch, path, share):
    monkeypatch.setattr(splade_loops, "SERIAL", 0)
    *inputs, mask_BS = factors(5, 7, 48, 200, seed=4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(5, 200, generator=generator) * (torch.rand(5, 200, generator=generator) < share)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            maxima = ours(*inputs, mask_BS, tile=64)
            runs.append([maxima, *gradients(maxima, inputs, gradient)])
    finally:
        torch.set_num_threads(before)
    # Matrix products may be split differently among more threads; the loops may not.
    for run in runs[1:] if path == LOOPS else runs[1:2]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_keeps_maxima_and_gradients_in_float32(path, dtype):
    *inputs, mask_BS = factors(4, 6, 32, 60, seed=7, dtype=torch.float32)
    exact = ours(*inputs, mask_BS)
    with torch.autocast("cpu", dtype=dtype):
        maxima = ours(*inputs, mask_BS)
        expected = stock(*inputs, mask_BS)
    assert maxima.dtype == torch.float32
    torch.testing.assert_close(maxima, exact, atol=0.15, rtol=0.02)
    torch.testing.assert_close(splade_weights(maxima), expected.float(), atol=0.02, rtol=0.02)
    gradient = torch.randn(maxima.shape, generator=torch.Generator().manual_seed(0))
    found = gradients(maxima, inputs, gradient)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    # A token may lose its maximum by rounding; so most, not all, gradients are close.
    for one, other in zip(found, gradients(exact, inputs, gradient), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


def test_parameters_in_bfloat16_get_gradients_in_bfloat16(path):
    *inputs, mask_BS = factors(3, 4, 16, 40, seed=8, dtype=torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    maxima = ours(*low, mask_BS)
    assert maxima.dtype == torch.float32
    exact = ours(*[tensor.float() for tensor in low], mask_BS)
    torch.testing.assert_close(maxima, exact, atol=0.1, rtol=0.02)
    found = gradients(maxima.sum(), low, None)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 3


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().size() // tensor.element_size())
        return result


def test_nothing_as_large_as_the_logits_is_ever_made(monkeypatch, path):
    monkeypatch.setattr(splade_head, "GATHERED_NUMBERS", 1 << 12)
    texts, longest, width, terms = 6, 40, 4, 500
    *inputs, _ = factors(texts, longest, width, terms, seed=9, dtype=torch.float32)
    mask_BS = torch.ones(texts, longest, dtype=torch.long)
    with Largest() as largest:
        splade_weights(ours(*inputs, mask_BS, tile=16)).sum().backward()
    assert largest.numbers <= max(terms * width, texts * longest * 17, 2 * texts * terms) < texts * longest * terms / 10
    with Largest() as largest:
        stock(*inputs, mask_BS).sum().backward()
    assert largest.numbers >= texts * longest * terms


def test_tokens_of_very_long_texts_are_counted():
    hidden = torch.zeros(40_000, 1)
    hidden[39_999] = 1
    hidden.requires_grad_()
    maxima = signed_maxima(hidden, torch.ones(2, 1), None, torch.tensor([40_000]))
    assert maxima.tolist() == [[1.0, 1.0]]
    maxima.sum().backward()
    assert hidden.grad.nonzero().tolist() == [[39_999, 0]]


def test_no_tokens_are_remembered_when_no_gradient_is_wanted(monkeypatch):
    seen = []
    reduce = TileReducer.reduce
    monkeypatch.setattr(TileReducer, "reduce", lambda *given, **more: (seen.append(given[3]), reduce(*given, **more)))
    signed_maxima(HIDDEN, WEIGHT, BIAS, LENGTHS)
    with torch.no_grad():
        signed_maxima(HIDDEN.clone().requires_grad_(), WEIGHT, BIAS, LENGTHS)
    assert seen == [None, None]


def test_tiles_cover_the_vocabulary_once():
    assert [(part.start, part.stop) for part in tiles(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert tile_width(tokens=1, terms=100) == 100
    assert tile_width(tokens=1 << 30, terms=5000) == 1024
    assert tile_width(tokens=1536, terms=250_002) == 2048


def test_padding_points_behind_the_last_token():
    assert padded_rows(torch.tensor([2, 0, 1])).tolist() == [[0, 1], [3, 3], [2, 3]]


def test_sparse_weights_are_the_weights_above_zero(path):
    hidden_BSH, weight_VH, bias_V, mask_BS = factors(5, 6, 8, 70, seed=10, empty=True, dtype=torch.float32)
    expected = splade_weights(ours(hidden_BSH, weight_VH, bias_V, mask_BS)).detach().numpy()
    given = (hidden_BSH[mask_BS.bool()], weight_VH, bias_V, mask_BS.sum(1))
    found = sparse_weights(*given, weights=splade_weights, tile=16)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    assert found.dtype == np.float32
    assert found.has_sorted_indices
    assert found.nnz == (expected > 0).sum()
    few = sparse_weights(*given, weights=splade_weights, max_active_terms=3)
    for row, weights in zip(few.toarray(), expected, strict=True):
        assert sorted(row[row > 0]) == pytest.approx(sorted(weights)[-3:] if weights.any() else [])


def test_of_equal_weights_the_first_terms_are_kept():
    matrix = csr_array(np.array([[0.0, 2.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 5.0], [0.0] * 5], np.float32))
    assert keep_largest(matrix, 2).toarray().tolist() == [[0, 2, 0, 2, 0], [0, 0, 0, 0, 5], [0] * 5]
    with pytest.raises(ValueError, match="count must be >= 1"):
        keep_largest(matrix, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.ones(3)}, r"must be \(N, H\) and \(V, H\)"),
        ({"weight_VH": torch.ones(2, 3)}, r"must be \(N, H\) and \(V, H\)"),
        ({"bias_V": torch.ones(3)}, r"bias_V must be \(2,\)"),
        ({"lengths_B": torch.tensor([2, 2])}, "with the sum 3, got the sum 4"),
        ({"lengths_B": torch.tensor([4, -1])}, "must be >= 0"),
        ({"weight_VH": torch.ones(2, 1, dtype=torch.float64)}, "must have one dtype"),
        ({"tile": 0}, "tile must be >= 1"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, message):
    given = {"hidden_NH": HIDDEN, "weight_VH": WEIGHT, "bias_V": BIAS, "lengths_B": LENGTHS}
    with pytest.raises(ValueError, match=message):
        signed_maxima(**(given | change))
