"""The teacher's decisions: which proposals pass, and what replaces the others. Pure functions of its logits.

Shape letters: N = positions, V = tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soju.speculative_kd.config import MOST_AUTO_TOP_K, AcceptRule
from soju.speculative_kd.noise import draw
from soju.speculative_kd.outcome import Outcome

TESTED_AT_ONCE = 64
"""Positions whose logits exist at a time: 64 x 151,936 float32 are 37 MiB."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What the teacher thinks of the proposals, one value a position."""

    outcome_N: Tensor
    """The `Outcome` of each."""
    rank_N: Tensor
    """Number of tokens the teacher finds more probable; ties count for the proposal."""
    probability_N: Tensor
    """Of the proposal under the teacher, at its temperature."""
    top_k_N: Tensor
    """The number of most probable tokens that were allowed."""
    finite_N: Tensor
    """False where the teacher's logits are NaN or infinite; nothing else holds there."""

    @property
    def passed_N(self) -> Tensor:
        """Whether the proposal stands."""
        return self.outcome_N == Outcome.PASSED


def decide(logits_NV: Tensor, proposals_N: Tensor, rule: AcceptRule) -> Decisions:
    """Test proposals against the teacher's distribution.

    A proposal passes if no token has a larger logit, or if fewer than `top_k` tokens have and its probability is at
    least `min_prob`. The first case keeps the most probable token of a flat distribution, in which nothing reaches
    `min_prob`.

    Args:
        logits_NV: The teacher's, ``(N, V)``; half precision is computed in float32.
        proposals_N: Token ids, ``(N,)``.
        rule: What passes.

    Returns:
        The decisions.

    References:
        Xu et al. 2024, arXiv:2410.11325 (interleaved sampling).
    """
    logits_NV = _at_least_float32(logits_NV)
    picked_N = logits_NV.gather(1, proposals_N[:, None]).squeeze(1)
    rank_N = (logits_NV > picked_N[:, None]).sum(dim=1)
    top_k_N, log_total_N = _allowed(logits_NV, rule)
    if rule.temperature == 0:
        probability_N = (rank_N == 0).to(logits_NV.dtype)
    else:
        probability_N = torch.exp(picked_N / rule.temperature - log_total_N)
    ranked_N, probable_N = rank_N < top_k_N, probability_N >= rule.min_prob
    outcome_N = torch.where(ranked_N, int(Outcome.REJECTED_BY_MIN_PROB), int(Outcome.REJECTED_BY_RANK))
    outcome_N.masked_fill_((rank_N == 0) | (ranked_N & probable_N), int(Outcome.PASSED))
    return Decisions(outcome_N, rank_N, probability_N, top_k_N, torch.isfinite(log_total_N))


def replace(logits_NV: Tensor, uniform_N: Tensor, rule: AcceptRule) -> Tensor:
    """Return the teacher's tokens for rejected proposals.

    ``full`` draws from its whole distribution: not from the residual of speculative decoding, because the text need not
    follow the teacher's distribution; such a token may itself be one that would not pass.

    Args:
        logits_NV: The teacher's, ``(N, V)``.
        uniform_N: In [0, 1), float64.
        rule: How to replace.

    Returns:
        Token ids, ``(N,)``.
    """
    if rule.replacement == "argmax":
        return logits_NV.argmax(dim=-1)
    if rule.replacement == "accept_set":
        logits_NV = logits_NV.masked_fill(~accept_set(logits_NV, rule), -torch.inf)
    return draw(logits_NV, rule.temperature, uniform_N)


def accept_set(logits_NV: Tensor, rule: AcceptRule) -> Tensor:
    """Return the tokens that `decide` lets pass, ``(N, V)`` bool; never empty."""
    logits_NV = _at_least_float32(logits_NV)
    top_k_N, log_total_N = _allowed(logits_NV, rule)
    most = min(MOST_AUTO_TOP_K if rule.top_k is None else rule.top_k, logits_NV.shape[1])
    sorted_NK = logits_NV.topk(most, dim=-1).values
    last_N = sorted_NK.gather(1, (top_k_N.clamp_max(most) - 1)[:, None])
    first_NV = logits_NV == sorted_NK[:, :1]
    if rule.temperature == 0:
        probable_NV = first_NV if rule.min_prob > 0 else torch.ones_like(first_NV)
    else:
        probable_NV = torch.exp(logits_NV / rule.temperature - log_total_N[:, None]) >= rule.min_prob
    return first_NV | ((logits_NV >= last_N) & probable_NV)


def decision_margin(logits_NV: Tensor, proposals_N: Tensor, rule: AcceptRule) -> Tensor:
    """Return how far each proposal's logit is from the other decision, ``(N,)`` in logits; other logits stay.

    In half precision two ways of computing may decide differently; this says how close the decision was. Under `top_k`
    ``auto`` the number of allowed tokens is taken as it is.
    """
    logits_NV = _at_least_float32(logits_NV)
    top_k_N, _ = _allowed(logits_NV, rule)
    own_N = logits_NV.gather(1, proposals_N[:, None]).squeeze(1)
    others_NV = logits_NV.scatter(1, proposals_N[:, None], -torch.inf)
    most = min(int(top_k_N.max()), logits_NV.shape[1])
    ranked_NK = others_NV.topk(most, dim=1).values
    first_N = ranked_NK[:, 0]
    by_rank_N = ranked_NK.gather(1, (top_k_N.clamp_max(most) - 1)[:, None]).squeeze(1)
    if rule.min_prob == 0:
        by_probability_N = torch.full_like(own_N, -torch.inf)
    elif rule.temperature == 0:
        by_probability_N = first_N
    else:
        odds = torch.logit(torch.tensor(rule.min_prob, dtype=own_N.dtype))
        by_probability_N = rule.temperature * (odds + torch.logsumexp(others_NV / rule.temperature, dim=1))
    # It passes from the lower of: the first place, and the later of both limits.
    return (own_N - torch.minimum(first_N, torch.maximum(by_rank_N, by_probability_N))).abs()


def _allowed(logits_NV: Tensor, rule: AcceptRule) -> tuple[Tensor, Tensor]:
    """Return `top_k` at each position, and the logarithm of the sum of the tempered exponentials."""
    greedy = rule.temperature == 0
    scaled_NV = logits_NV if greedy else logits_NV / rule.temperature
    log_total_N = torch.logsumexp(scaled_NV, dim=-1)
    if rule.top_k is not None:
        return torch.full_like(log_total_N, rule.top_k, dtype=torch.long), log_total_N
    if greedy:
        return torch.ones_like(log_total_N, dtype=torch.long), log_total_N
    entropy_N = log_total_N - (torch.exp(scaled_NV - log_total_N[:, None]) * scaled_NV).sum(dim=-1)
    # The slack keeps rounding from adding a token where the exact number is whole: one certain token, n equal ones.
    perplexity_N = torch.exp(entropy_N) - 1e-4
    return perplexity_N.ceil().clamp(1, MOST_AUTO_TOP_K).nan_to_num(1).long(), log_total_N


def _at_least_float32(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
