"""Divergence of two next-token distributions, from hidden states and output embeddings.

`token_divergence` never holds all logits. It takes 64 tokens at a time, and while their logits exist it makes the
divergence and its gradient: two products for the logits, one for the gradient of the hidden states, one for that of the
output embedding. A backward pass that starts from hidden states has to make the logits again, six products in all.

The functions of logits in this file define each divergence; its gradients are checked against theirs.

Shape letters: N = tokens, C = tokens of a chunk, V = tokens of the vocabulary, H and G = hidden widths of student and
teacher, K = most probable tokens. In formulas s and t are the student's and the teacher's probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soju.speculative_kd.config import DivergenceName, DivergenceSettings

CHUNK = 64
"""Tokens whose logits exist at a time; at V 151,936 one float32 tensor of them is 37 MiB."""

TILE = 8192
"""Rows of an output embedding that are converted at a time when its dtype is not that of the sums."""


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return KL(teacher‖student) = sum of t log(t / s) for each token, ``(N,)``, from logits."""
    log_s, log_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return KL(student‖teacher) = sum of s log(s / t) for each token, ``(N,)``, from logits."""
    return forward_kl(teacher_NV, student_NV)


def generalized_jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """Return β KL(teacher‖m) + (1-β) KL(student‖m) with m = β t + (1-β) s for each token, ``(N,)``, from logits.

    References:
        Agarwal et al. 2023, arXiv:2306.13649 (GKD).
    """
    log_s, log_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    from_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    from_student = (log_s.exp() * (log_s - log_m)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def skew_kl(student_NV: Tensor, teacher_NV: Tensor, alpha: float) -> Tensor:
    """Return KL(teacher‖α t + (1-α) s) for each token, ``(N,)``, from logits; at α 0 it is `forward_kl`.

    References:
        Ko et al. 2024, arXiv:2402.03898 (DistiLLM).
    """
    log_s, log_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    log_m = log_s if alpha == 0 else torch.logaddexp(log_t + math.log(alpha), log_s + math.log1p(-alpha))
    return (log_t.exp() * (log_t - log_m)).sum(-1)


def top_k_kl(student_NV: Tensor, teacher_NV: Tensor, top_k: int) -> Tensor:
    """Return KL(teacher‖student) over the teacher's K most probable tokens and one bucket of the rest, from logits.

    Never above `forward_kl`, because merging tokens loses divergence.
    """
    log_s, log_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    chosen_NK = teacher_NV.topk(top_k, dim=-1).indices
    rest_NV = torch.ones_like(teacher_NV, dtype=torch.bool).scatter_(-1, chosen_NK, False)
    buckets = [
        torch.cat([log.gather(-1, chosen_NK), log.masked_fill(~rest_NV, -torch.inf).logsumexp(-1, keepdim=True)], -1)
        for log in (log_s, log_t)
    ]
    return (buckets[1].exp() * (buckets[1] - buckets[0])).sum(-1)


def dense_divergence(student_NV: Tensor, teacher_NV: Tensor, settings: DivergenceSettings) -> Tensor:
    """Return the divergence of each token, ``(N,)``, from all logits: what `token_divergence` computes in chunks."""
    student_NV, teacher_NV = student_NV / settings.temperature, teacher_NV / settings.temperature
    return _FORMS[settings.divergence].dense(student_NV, teacher_NV, settings)


class Projection(NamedTuple):
    """Hidden states, and the output embedding that makes logits of them."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None


def token_divergence(
    student: Projection,
    teacher: Projection,
    settings: DivergenceSettings | None = None,
    *,
    weights_N: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the divergence over tokens, and the divergence of each.

    The gradient is made in the forward pass, so `backward` may run once.

    Args:
        student: Hidden states ``(N, H)`` and output embedding ``(V, H)``; gradients go to those that require one, and
            the others cost nothing.
        teacher: ``(N, G)`` and ``(V, G)`` for the same tokens, on the student's device; no gradient.
        settings: Which divergence, and the temperature, which is not squared into the loss.
        weights_N: Of each token in the sum, for example 1 / tokens of the step; 1 if not given. No gradient.
        chunk: Tokens at a time.

    Returns:
        A scalar to minimise, in nats, and ``(N,)`` without gradient; float64 for float64 hidden states, else float32.

    Raises:
        ValueError: If shapes do not belong together.
    """
    settings = settings or DivergenceSettings()
    _check(student, teacher, settings, weights_N, chunk)
    loss, divergence_N = _TokenDivergence.apply(*student, *teacher, weights_N, settings, chunk)  # type: ignore[no-untyped-call]
    return loss, divergence_N


class _TokenDivergence(torch.autograd.Function):
    """`token_divergence`; keeps nothing but the finished gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        teacher_hidden_NG: Tensor,
        teacher_weight_VG: Tensor,
        teacher_bias_V: Tensor | None,
        weights_N: Tensor | None,
        settings: DivergenceSettings,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        tokens, form = len(hidden_NH), _FORMS[settings.divergence]
        learned = [
            tensor if needed else None
            for tensor, needed in zip((hidden_NH, weight_VH, bias_V), ctx.needs_input_grad, strict=False)
        ]
        gradients = [None if tensor is None else torch.zeros_like(tensor, dtype=dtype) for tensor in learned]
        divergence_N = torch.empty(tokens, dtype=dtype, device=hidden_NH.device)
        weights_N = torch.ones_like(divergence_N) if weights_N is None else weights_N.to(dtype)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            student_head = _Head(weight_VH, bias_V, hidden_NH.dtype, settings.temperature)
            teacher_head = _Head(teacher_weight_VG, teacher_bias_V, teacher_hidden_NG.dtype, settings.temperature)
            shape = (min(chunk, tokens), len(weight_VH))
            buffers = [torch.empty(shape, dtype=dtype, device=hidden_NH.device) for _ in range(4 + form.mixture)]
            for start in range(0, tokens, chunk):
                part = slice(start, min(start + chunk, tokens))
                views = [buffer[: part.stop - part.start] for buffer in buffers]
                s = student_head.softmax(hidden_NH[part], views[0], views[1])
                t = teacher_head.softmax(teacher_hidden_NG[part], views[2], views[3])
                scale_C1 = (weights_N[part] / settings.temperature)[:, None]
                divergence_N[part] = form.chunked(s, t, scale_C1, settings, *views[4:])
                student_head.add_gradients(views[1], hidden_NH[part], part, gradients)
        ctx.gradients = [
            None if tensor is None or gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, learned, strict=True)
        ]
        ctx.mark_non_differentiable(divergence_N)
        return torch.dot(weights_N, divergence_N), divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "token_divergence: backward ran twice; call token_divergence again for each backward pass"
            )
        # Handed over, not kept: autograd then takes the (V, H) gradient as it is instead of copying it.
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(gradient.to(g.dtype)) for g in gradients), *[None] * 6)


@dataclass(slots=True)
class _Softmax:
    """Tempered logits of a chunk less their largest, their exponentials, and the sums of these."""

    shifted_CV: Tensor
    exp_CV: Tensor
    total_C1: Tensor

    @property
    def log_total_C(self) -> Tensor:
        return self.total_C1.squeeze(1).log()

    def logs_(self) -> Tensor:
        """Turn the shifted logits into log probabilities, in place."""
        return self.shifted_CV.sub_(self.total_C1.log())

    def probabilities_(self) -> Tensor:
        """Turn the exponentials into probabilities, in place."""
        return self.exp_CV.div_(self.total_C1)


class _Head:
    """An output embedding in the forms its products need."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, hidden_dtype: torch.dtype, temperature: float) -> None:
        half = hidden_dtype in (torch.bfloat16, torch.float16)
        self.tensor_cores = half and weight_VH.device.type == "cuda"
        """Half-precision factors with float32 sums, which only CUDA offers; elsewhere halves are converted."""
        self.weight_VH = weight_VH.to(hidden_dtype) if self.tensor_cores else weight_VH
        self.bias_V = bias_V
        self.temperature = temperature

    def softmax(self, hidden_CH: Tensor, logits_CV: Tensor, exp_CV: Tensor) -> _Softmax:
        """Fill the two tensors."""
        if self.tensor_cores:
            torch.mm(hidden_CH, self.weight_VH.T, out_dtype=logits_CV.dtype, out=logits_CV)
        else:
            hidden_CH = hidden_CH.to(logits_CV.dtype)
            for tile in self._tiles(logits_CV.dtype):
                torch.mm(hidden_CH, self.weight_VH[tile].to(logits_CV.dtype).T, out=logits_CV[:, tile])
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.temperature != 1:
            logits_CV /= self.temperature
        logits_CV -= logits_CV.amax(dim=1, keepdim=True)
        torch.exp(logits_CV, out=exp_CV)
        return _Softmax(logits_CV, exp_CV, exp_CV.sum(dim=1, keepdim=True))

    def add_gradients(
        self, logits_gradient_CV: Tensor, hidden_CH: Tensor, part: slice, gradients: list[Tensor | None]
    ) -> None:
        """Add what a chunk contributes to the gradients of hidden states, weight and bias."""
        for_hidden, for_weight, for_bias = gradients
        if for_bias is not None:
            for_bias += logits_gradient_CV.sum(dim=0)
        if self.tensor_cores:
            rounded_CV = logits_gradient_CV.to(hidden_CH.dtype)
            if for_hidden is not None:
                for_hidden[part] = torch.mm(rounded_CV, self.weight_VH)
            if for_weight is not None:
                torch.addmm(for_weight, rounded_CV.T, hidden_CH, out_dtype=for_weight.dtype, out=for_weight)
            return
        if for_hidden is not None:
            for tile in self._tiles(for_hidden.dtype):
                for_hidden[part].addmm_(logits_gradient_CV[:, tile], self.weight_VH[tile].to(for_hidden.dtype))
        if for_weight is not None:
            for_weight.addmm_(logits_gradient_CV.T, hidden_CH.to(for_weight.dtype))

    def _tiles(self, dtype: torch.dtype) -> list[slice]:
        """Return one slice if nothing has to be converted."""
        terms = len(self.weight_VH)
        width = terms if self.weight_VH.dtype == dtype else TILE
        return [slice(start, min(start + width, terms)) for start in range(0, terms, width)]


# Each of the following returns the divergence of a chunk's tokens and leaves its gradient with respect to the student's
# logits, times scale_C1, in s.exp_CV. All four buffers may be overwritten. The softmax turns a gradient g with respect
# to probabilities into s (g - sum of s g).


def _forward_kl(s: _Softmax, t: _Softmax, scale_C1: Tensor, settings: DivergenceSettings) -> Tensor:
    """Gradient s - t. One exponential a logit and side: sums over t come from its unnormalised form."""
    total_C = t.total_C1.squeeze(1)
    gap_C = (_dot(t.exp_CV, t.shifted_CV) - _dot(t.exp_CV, s.shifted_CV)) / total_C
    divergence_C = gap_C - t.log_total_C + s.log_total_C
    s.exp_CV.mul_(scale_C1 / s.total_C1).sub_(t.exp_CV.mul_(scale_C1 / t.total_C1))
    return divergence_C


def _reverse_kl(s: _Softmax, t: _Softmax, scale_C1: Tensor, settings: DivergenceSettings) -> Tensor:
    """Gradient s (log s - log t - KL)."""
    log_totals_C = t.log_total_C - s.log_total_C
    difference_CV = s.shifted_CV.sub_(t.shifted_CV)
    divergence_C = _dot(s.exp_CV, difference_CV) / s.total_C1.squeeze(1) + log_totals_C
    s.exp_CV.mul_(difference_CV.add_((log_totals_C - divergence_C)[:, None])).mul_(scale_C1 / s.total_C1)
    return divergence_C


def _generalized_jsd(
    s: _Softmax, t: _Softmax, scale_C1: Tensor, settings: DivergenceSettings, mixture_CV: Tensor
) -> Tensor:
    """Gradient (1-β) s (log s - log m - KL(s‖m))."""
    beta = settings.beta
    log_m_CV = _mixture(s, t, beta, mixture_CV).log_()
    from_teacher_C = _dot(t.exp_CV, t.logs_().sub_(log_m_CV))
    gap_CV = s.logs_().sub_(log_m_CV)
    from_student_C = _dot(s.exp_CV, gap_CV)
    s.exp_CV.mul_(gap_CV.sub_(from_student_C[:, None])).mul_(scale_C1 * (1 - beta))
    return beta * from_teacher_C + (1 - beta) * from_student_C


def _skew_kl(s: _Softmax, t: _Softmax, scale_C1: Tensor, settings: DivergenceSettings, mixture_CV: Tensor) -> Tensor:
    """Gradient (1-α) (s r - t s / m) with r = sum of t s / m; s / m is at most 1 / (1-α), t / m has no such bound."""
    m_CV = _mixture(s, t, settings.alpha, mixture_CV)
    share_CV = torch.div(s.exp_CV, m_CV, out=s.shifted_CV).mul_(t.exp_CV)
    divergence_C = _dot(t.exp_CV, t.logs_().sub_(m_CV.log_()))
    s.exp_CV.mul_(share_CV.sum(dim=1, keepdim=True)).sub_(share_CV).mul_(scale_C1 * (1 - settings.alpha))
    return divergence_C


def _top_k(s: _Softmax, t: _Softmax, scale_C1: Tensor, settings: DivergenceSettings) -> Tensor:
    """Gradient s - t for the K tokens, s (1 - T / S) in the rest, where T and S are both sides' mass of the rest.

    The mass is summed over the rest and not 1 minus the K tokens: it may be far below the rounding of that difference.
    """
    chosen_CK = t.shifted_CV.topk(settings.top_k, dim=1).indices
    logs = [(side.shifted_CV.gather(1, chosen_CK) - side.total_C1.log()) for side in (s, t)]
    rests = []
    for side in (s, t):
        side.exp_CV.scatter_(1, chosen_CK, 0.0)
        rests.append(side.exp_CV.sum(dim=1, keepdim=True) / side.total_C1)
    s_rest_C1, t_rest_C1 = rests[0].clamp_min(torch.finfo(s.exp_CV.dtype).tiny), rests[1]
    (log_s_CK, log_t_CK), t_CK = logs, logs[1].exp()
    rest_C = (torch.xlogy(t_rest_C1, t_rest_C1) - t_rest_C1 * s_rest_C1.log()).squeeze(1)
    s.exp_CV.mul_(scale_C1 * (1 - t_rest_C1 / s_rest_C1) / s.total_C1)
    s.exp_CV.scatter_(1, chosen_CK, scale_C1 * (log_s_CK.exp() - t_CK))
    return (t_CK * (log_t_CK - log_s_CK)).sum(dim=1) + rest_C


def _mixture(s: _Softmax, t: _Softmax, teacher_share: float, out_CV: Tensor) -> Tensor:
    """Return the mixed probabilities; kept above 0, so that 0 log 0 does not become NaN where both sides underflow."""
    torch.mul(t.probabilities_(), teacher_share, out=out_CV)
    return out_CV.add_(s.probabilities_(), alpha=1 - teacher_share).clamp_min_(torch.finfo(out_CV.dtype).tiny)


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_CV, right_CV)


@dataclass(frozen=True, slots=True)
class _Form:
    """One divergence: by definition, and in chunks with its gradient."""

    dense: Callable[[Tensor, Tensor, DivergenceSettings], Tensor]
    chunked: Callable[..., Tensor]
    mixture: bool = False
    """Whether it needs one more buffer."""


_FORMS: dict[DivergenceName, _Form] = {
    "forward_kl": _Form(lambda s, t, _: forward_kl(s, t), _forward_kl),
    "reverse_kl": _Form(lambda s, t, _: reverse_kl(s, t), _reverse_kl),
    "generalized_jsd": _Form(lambda s, t, c: generalized_jsd(s, t, c.beta), _generalized_jsd, mixture=True),
    "skew_kl": _Form(lambda s, t, c: skew_kl(s, t, c.alpha), _skew_kl, mixture=True),
    "top_k": _Form(lambda s, t, c: top_k_kl(s, t, c.top_k), _top_k),
}


def _check(
    student: Projection, teacher: Projection, settings: DivergenceSettings, weights_N: Tensor | None, chunk: int
) -> None:
    """Refuse tensors that do not belong together."""
    for side, (hidden_NH, weight_VH, bias_V) in (("student", student), ("teacher", teacher)):
        if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
            shapes = f"{tuple(hidden_NH.shape)} and {tuple(weight_VH.shape)}"
            raise ValueError(f"{side}: hidden states and output embedding must be (N, H) and (V, H), got {shapes}")
        if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
            raise ValueError(f"{side}: the bias must be ({len(weight_VH)},), got {tuple(bias_V.shape)}")
    tokens, vocabulary = len(student.hidden_NH), len(student.weight_VH)
    if (tokens, vocabulary) != (len(teacher.hidden_NH), len(teacher.weight_VH)):
        raise ValueError(
            f"student has {tokens} tokens of a vocabulary of {vocabulary}, "
            f"teacher {len(teacher.hidden_NH)} of {len(teacher.weight_VH)}; both must be equal"
        )
    if weights_N is not None and weights_N.shape != (tokens,):
        raise ValueError(f"weights_N must be ({tokens},), got {tuple(weights_N.shape)}")
    if tokens == 0 or chunk < 1:
        raise ValueError(f"there must be at least one token and chunk >= 1, got {tokens} and {chunk}")
    if settings.divergence == "top_k" and settings.top_k >= vocabulary:
        raise ValueError(f"top_k {settings.top_k} leaves no rest of {vocabulary} tokens; lower it or use forward_kl")
