"""Divergences: by hand, against plain autograd, finite differences and TRL; memory and refusals."""

import importlib.util
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from soju.speculative_kd.config import DivergenceSettings
from soju.speculative_kd.divergence import (
    Projection,
    dense_divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    token_divergence,
    top_k_kl,
)

# Teacher 1/2, 1/4, 1/4; student 1/4, 1/2, 1/4.
TEACHER = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
LOG2 = math.log(2)

SETTINGS = {
    "forward_kl": DivergenceSettings(),
    "reverse_kl": DivergenceSettings(divergence="reverse_kl"),
    "jsd": DivergenceSettings(divergence="generalized_jsd"),
    "jsd to the teacher": DivergenceSettings(divergence="generalized_jsd", beta=0.9),
    "skew_kl": DivergenceSettings(divergence="skew_kl"),
    "skew_kl at 0": DivergenceSettings(divergence="skew_kl", alpha=0.0),
    "skew_kl at .7": DivergenceSettings(divergence="skew_kl", alpha=0.7),
    "top_k": DivergenceSettings(divergence="top_k", top_k=5),
    "top_1": DivergenceSettings(divergence="top_k", top_k=1),
}
ALL = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def test_forward_kl_by_hand():
    # 1/2 log 2 + 1/4 log 1/2
    assert forward_kl(STUDENT, TEACHER).item() == pytest.approx(LOG2 / 4)


def test_reverse_kl_swaps_the_sides():
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    assert reverse_kl(uniform, TEACHER).item() == pytest.approx((2 * math.log(4 / 3) + math.log(2 / 3)) / 3)
    assert forward_kl(uniform, TEACHER).item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75))


def test_jensen_shannon_by_hand():
    # The mixture is 3/8, 3/8, 1/4; both sides are as far from it.
    side = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert generalized_jsd(STUDENT, TEACHER, 0.5).item() == pytest.approx(side)


def test_jensen_shannon_leans_to_the_kl_at_either_end():
    assert generalized_jsd(STUDENT * 2, TEACHER, 1e-6).item() / 1e-6 == pytest.approx(
        forward_kl(STUDENT * 2, TEACHER).item(), rel=1e-4
    )
    assert generalized_jsd(STUDENT * 2, TEACHER, 1 - 1e-6).item() / 1e-6 == pytest.approx(
        reverse_kl(STUDENT * 2, TEACHER).item(), rel=1e-4
    )


def test_skew_kl_by_hand():
    # At α 1/2 the mixture is 3/8, 3/8, 1/4.
    assert skew_kl(STUDENT, TEACHER, 0.5).item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))
    assert skew_kl(STUDENT, TEACHER, 0.0).item() == pytest.approx(LOG2 / 4)


def test_top_k_by_hand():
    # One token of 1/2 against 1/4, and a rest of 1/2 against 3/4.
    assert top_k_kl(STUDENT, TEACHER, 1).item() == pytest.approx(0.5 * LOG2 + 0.5 * math.log(2 / 3))


def test_top_k_is_never_above_forward_kl_and_grows_to_it():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(50, 20, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    values = [top_k_kl(student, teacher, k) for k in (1, 5, 15, 19)] + [forward_kl(student, teacher)]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(values[-2], values[-1])  # a rest of one token


def inputs(tokens=11, vocabulary=37, student=6, teacher=9, *, seed=0, dtype=torch.float64, bias=True, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread**0.5).to(dtype)

    sides = [
        Projection(normal(tokens, width), normal(vocabulary, width), normal(vocabulary) if bias else None)
        for width in (student, teacher)
    ]
    for tensor in sides[0]:
        if tensor is not None:
            tensor.requires_grad_()
    return sides[0], sides[1], normal(tokens).abs().detach()


def logits(side):
    found = side.hidden_NH @ side.weight_VH.T
    return found if side.bias_V is None else found + side.bias_V


def gradients(loss, side):
    return torch.autograd.grad(loss, [tensor for tensor in side if tensor is not None and tensor.requires_grad])


@ALL
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunks_are_the_dense_divergence_in_value_and_gradient(settings, temperature, chunk):
    settings = settings.model_copy(update={"temperature": temperature})
    student, teacher, weights = inputs()
    loss, values = token_divergence(student, teacher, settings, weights_N=weights, chunk=chunk)
    dense = dense_divergence(logits(student), logits(teacher), settings)
    torch.testing.assert_close(values, dense.detach())
    torch.testing.assert_close(loss, (weights * dense).sum())
    for found, expected in zip(
        gradients(loss * 3, student), gradients((weights * dense).sum() * 3, student), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert not values.requires_grad


class Fresh(torch.autograd.Function):
    """`token_divergence` with a new forward pass for each backward pass, which gradcheck runs several times."""

    @staticmethod
    def forward(ctx, teacher, settings, *side):
        ctx.given = teacher, settings, side
        return token_divergence(Projection(*side), teacher, settings)[0]

    @staticmethod
    def backward(ctx, gradient):
        teacher, settings, side = ctx.given
        with torch.enable_grad():
            side = [tensor.detach().requires_grad_() for tensor in side]
            found = torch.autograd.grad(token_divergence(Projection(*side), teacher, settings, chunk=2)[0], side)
        return (None, None, *(gradient * tensor for tensor in found))


@ALL
def test_gradients_are_finite_differences(settings):
    settings = settings.model_copy(update={"temperature": 1.3})
    student, teacher, _ = inputs(tokens=3, vocabulary=9, student=3, teacher=4, spread=1.0)
    assert gradcheck(lambda *side: Fresh.apply(teacher, settings, *side), tuple(student))


@ALL
def test_float32_is_near_float64(settings):
    exact = inputs(tokens=40, vocabulary=300)
    single = [
        Projection(*(tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in side))
        for side in exact[:2]
    ]
    expected, values = token_divergence(exact[0], exact[1], settings)
    found, single_values = token_divergence(*single, settings)
    assert found.dtype == single_values.dtype == torch.float32
    torch.testing.assert_close(single_values.double(), values, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(found, single[0]), gradients(expected, exact[0]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


@ALL
def test_bfloat16_sums_in_float32(settings):
    # Converted in tiles; a vocabulary that no tile divides.
    student, teacher, weights = inputs(tokens=5, vocabulary=8192 + 77, student=4, teacher=3, dtype=torch.bfloat16)
    loss, values = token_divergence(student, teacher, settings, weights_N=weights)
    assert values.dtype == torch.float32
    exact = [
        Projection(*(t.detach().double().requires_grad_(t.requires_grad) for t in side)) for side in (student, teacher)
    ]
    dense = dense_divergence(logits(exact[0]), logits(exact[1]), settings)
    torch.testing.assert_close(values.double(), dense.detach(), rtol=1e-4, atol=1e-5)
    expected = gradients((weights.double() * dense).sum(), exact[0])
    for one, other in zip(gradients(loss, student), expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


@ALL
def test_far_apart_distributions_stay_finite(settings):
    student, teacher, _ = inputs(tokens=8, spread=1.0, dtype=torch.float32)
    student, teacher = (
        Projection(side.hidden_NH.detach().mul(60).requires_grad_(), *side[1:]) for side in (student, teacher)
    )
    loss, _ = token_divergence(student, teacher, settings)
    for found in gradients(loss, student):
        assert torch.isfinite(found).all()
    assert torch.isfinite(loss)


@ALL
def test_equal_sides_have_no_divergence_and_no_gradient(settings):
    student, _, _ = inputs()
    teacher = Projection(*(tensor.detach() for tensor in student))
    loss, values = token_divergence(student, teacher, settings)
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-12, rtol=0)
    for found in gradients(loss, student):
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


@pytest.mark.parametrize("learned", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_only_what_is_learned_gets_a_gradient(learned):
    student, teacher, _ = inputs()
    expected = gradients(token_divergence(student, teacher)[0], student)
    side = Projection(*(tensor.detach().requires_grad_(place in learned) for place, tensor in enumerate(student)))
    token_divergence(side, teacher)[0].backward()
    for place, tensor in enumerate(side):
        if place in learned:
            torch.testing.assert_close(tensor.grad, expected[place])
        else:
            assert tensor.grad is None


def test_a_token_without_weight_has_no_gradient():
    student, teacher, weights = inputs()
    weights[4] = 0
    loss, _ = token_divergence(student, teacher, weights_N=weights)
    found = gradients(loss, student)[0]
    assert (found[4] == 0).all()
    assert (found[3] != 0).any()


def test_without_gradients_nothing_is_kept():
    student, teacher, _ = inputs()
    with torch.no_grad():
        loss, _ = token_divergence(student, teacher)
    assert not loss.requires_grad


def test_a_second_backward_pass_is_refused():
    student, teacher, _ = inputs()
    loss, _ = token_divergence(student, teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_a_tied_embedding_gets_both_gradients():
    torch.manual_seed(0)
    embedding = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 2, 3, 4])
    _, teacher, _ = inputs(tokens=4, vocabulary=30)
    loss, _ = token_divergence(Projection(torch.tanh(embedding[ids]), embedding), teacher)
    (found,) = torch.autograd.grad(loss, embedding)
    dense = dense_divergence(torch.tanh(embedding[ids]) @ embedding.T, logits(teacher), DivergenceSettings()).sum()
    torch.testing.assert_close(found, torch.autograd.grad(dense, embedding)[0])


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the oracle is TRL 1.16; pip install --no-deps trl==1.16.0"
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("generalized_jsd", 0.5), ("generalized_jsd", 0.1)]
)
def test_trl_gives_the_same(name, beta, temperature, bias):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher, weights = inputs(tokens=40, vocabulary=500, dtype=torch.float32, bias=bias, spread=1.0)
    theirs, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, temperature)
    settings = DivergenceSettings(divergence=name, temperature=temperature, **({"beta": beta} if 0 < beta < 1 else {}))
    loss, values = token_divergence(student, teacher, settings, weights_N=weights, chunk=16)
    torch.testing.assert_close(values, theirs.detach(), rtol=1e-4, atol=1e-5)
    for ours, other in zip(gradients(loss, student), gradients((weights * theirs).sum(), student), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, t: (Projection(s.hidden_NH[:, :-1], s.weight_VH), t), r"student: .* \(N, H\) and \(V, H\)"),
        (lambda s, t: (s, Projection(t.hidden_NH[:-1], t.weight_VH)), "student has 11 tokens .* teacher 10"),
        (lambda s, t: (s, Projection(t.hidden_NH, t.weight_VH[:-1])), "of a vocabulary of 37, teacher 11 of 36"),
        (lambda s, t: (Projection(s.hidden_NH, s.weight_VH, s.bias_V[:-1]), t), r"the bias must be \(37,\)"),
        (
            lambda s, t: (Projection(s.hidden_NH[:0], s.weight_VH), Projection(t.hidden_NH[:0], t.weight_VH)),
            "one token",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, match):
    student, teacher, _ = inputs()
    with pytest.raises(ValueError, match=match):
        token_divergence(*change(student, teacher))


def test_weights_and_top_k_must_fit():
    student, teacher, weights = inputs()
    with pytest.raises(ValueError, match=r"weights_N must be \(11,\)"):
        token_divergence(student, teacher, weights_N=weights[:-1])
    with pytest.raises(ValueError, match="top_k 37 leaves no rest of 37 tokens"):
        token_divergence(student, teacher, DivergenceSettings(divergence="top_k", top_k=37))


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"beta": 1}, {"alpha": 1}, {"temperature": 0}, {"divergence": "kl"}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="validation error"):
        DivergenceSettings(**wrong)


def test_no_logits_of_all_tokens_are_made():
    # The largest tensor is a chunk's or the embedding's gradient, never (tokens, vocabulary).
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    student, teacher, _ = inputs(tokens=400, vocabulary=1000, student=8, teacher=8)
    with Largest() as seen:
        token_divergence(student, teacher, chunk=10)[0].backward()
    assert seen.size == 1000 * 10
