"""What passes and what replaces, with values worked by hand and a reference in plain Python."""

import math
import random

import pytest
import torch

from soju.speculative_kd.acceptance import accept_set, decide, decision_margin, replace
from soju.speculative_kd.config import AcceptRule
from soju.speculative_kd.outcome import Outcome

# Probabilities .5, .25, .15, .1 at temperature 1.
LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()


def rule(top_k=2, min_prob=0.0, replacement="full", temperature=1.0):
    return AcceptRule(top_k, min_prob, replacement, temperature)


def outcomes(logits, rule):
    """The outcome of each token as a proposal."""
    size = len(logits)
    return decide(logits.expand(size, size), torch.arange(size), rule).outcome_N.tolist()


def by_definition(logits, token, rule):
    """One decision in plain Python: (rank, probability, top_k, passed)."""
    values = [float(z) for z in logits]
    rank = sum(z > values[token] for z in values)
    if rule.temperature == 0:
        return rank, float(rank == 0), rule.top_k or 1, rank == 0 or (rank < (rule.top_k or 1) and rule.min_prob == 0)
    weights = [math.exp((z - max(values)) / rule.temperature) for z in values]
    p = [w / sum(weights) for w in weights]
    top_k = rule.top_k
    if top_k is None:
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        top_k = max(1, min(25, math.ceil(math.exp(entropy) - 1e-4)))
    return rank, p[token], top_k, rank == 0 or (rank < top_k and p[token] >= rule.min_prob)


def test_the_top_k_pass():
    assert outcomes(LOGITS, rule(2)) == [0, 0, Outcome.REJECTED_BY_RANK, Outcome.REJECTED_BY_RANK]


def test_min_prob_rejects_within_the_top_k():
    assert outcomes(LOGITS, rule(3, 0.2)) == [0, 0, Outcome.REJECTED_BY_MIN_PROB, Outcome.REJECTED_BY_RANK]


def test_the_first_always_passes():
    # In a flat distribution nothing reaches min_prob.
    flat = torch.zeros(50, dtype=torch.float64)
    flat[7] = 0.01
    assert [token for token, o in enumerate(outcomes(flat, rule(5, 0.05))) if o == Outcome.PASSED] == [7]


def test_ties_count_for_the_proposal():
    tied = torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0])
    assert outcomes(tied, rule(1))[:2] == [0, 0]
    assert outcomes(tied, rule(3)) == [0, 0, 0, 0, Outcome.REJECTED_BY_RANK]


def test_temperature_moves_the_probability_and_not_the_rank():
    # Squared and normalised, .25 becomes .0625 / .345 = .181.
    decisions = decide(LOGITS[None], torch.tensor([1]), rule(2, temperature=0.5))
    assert decisions.rank_N.item() == 1
    assert decisions.probability_N.item() == pytest.approx(0.0625 / 0.345)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [([1.0], 1), ([0.25] * 4, 4), ([0.5, 0.25, 0.25], 3), ([0.99, 0.01], 2), ([1 / 60] * 60, 25)],
    ids=["certain", "four equal", "2^1.5", "nearly certain", "flat"],
)
def test_auto_takes_the_perplexity_rounded_up(probabilities, expected):
    logits = torch.tensor([*probabilities, *[0.0] * (60 - len(probabilities))], dtype=torch.float64).add(1e-300).log()
    assert decide(logits[None], torch.tensor([0]), rule(None)).top_k_N.item() == expected


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 100, None])
@pytest.mark.parametrize("min_prob", [0, 0.05, 0.3, 1.0])
def test_decisions_are_the_definition_and_the_accept_set_is_what_passes(temperature, top_k, min_prob):
    random.seed(str((temperature, top_k, min_prob)))
    generator = torch.Generator().manual_seed(random.randrange(1000))
    the_rule = rule(top_k, min_prob, temperature=temperature)
    for sharpness in (0.1, 1, 4):
        logits = torch.randn(40, generator=generator, dtype=torch.float64) * sharpness
        logits[3] = logits[11]  # a tie
        decisions = decide(logits.expand(40, 40), torch.arange(40), the_rule)
        expected = [by_definition(logits, token, the_rule) for token in range(40)]
        assert decisions.rank_N.tolist() == [e[0] for e in expected]
        assert decisions.probability_N.tolist() == pytest.approx([e[1] for e in expected])
        assert decisions.top_k_N.tolist() == [e[2] for e in expected]
        assert decisions.passed_N.tolist() == [e[3] for e in expected]
        assert accept_set(logits[None], the_rule)[0].tolist() == decisions.passed_N.tolist()


def test_full_replaces_from_all_tokens():
    uniform = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)
    tokens = replace(LOGITS.expand(1000, 4), uniform, rule(1))
    assert torch.bincount(tokens).tolist() == [500, 250, 150, 100]


def test_accept_set_replaces_from_what_passes():
    uniform = torch.linspace(0, 0.9999, 900, dtype=torch.float64)
    tokens = replace(LOGITS.expand(900, 4), uniform, rule(3, 0.2, "accept_set"))
    assert torch.bincount(tokens).tolist() == [600, 300]  # .5 and .25, made to sum to 1


def test_argmax_replaces_by_the_first():
    assert replace(LOGITS[None], torch.zeros(1), rule(3, replacement="argmax")).tolist() == [0]


def test_half_precision_is_decided_in_float32():
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16()
    proposals = logits.topk(3).indices[:, 2]
    exact, half = (decide(z, proposals, rule(5, 0.05)) for z in (logits.double(), logits))
    torch.testing.assert_close(half.probability_N.double(), exact.probability_N, rtol=1e-5, atol=1e-7)


def test_logits_that_are_not_finite_are_marked():
    logits = LOGITS.repeat(2, 1)
    logits[1, 2] = torch.nan
    assert decide(logits, torch.tensor([0, 0]), rule()).finite_N.tolist() == [True, False]


def test_a_margin_by_hand():
    # Token 1 (.25) is second of two allowed: it falls to rank 2 below .15, at log .25/.15.
    assert decision_margin(LOGITS[None], torch.tensor([1]), rule(2)).item() == pytest.approx(math.log(0.25 / 0.15))
    # It needs a probability of .5, so its odds, now 1 : 3, must become 1 : 1.
    assert decision_margin(LOGITS[None], torch.tensor([1]), rule(2, 0.5)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("top_k", [1, 3, 39, 100])
@pytest.mark.parametrize("min_prob", [0, 0.05, 0.3])
def test_a_margin_is_where_the_decision_turns(temperature, top_k, min_prob):
    the_rule = rule(top_k, min_prob, temperature=temperature)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    tokens = torch.arange(40)
    passed = decide(logits.expand(40, 40), tokens, the_rule).passed_N
    margins = decision_margin(logits.expand(40, 40), tokens, the_rule)
    for token in range(40):
        if torch.isinf(margins[token]):  # nothing turns it
            assert passed[token]
            continue
        towards = -1 if passed[token] else 1
        for step, expected in ((1e-6, not passed[token]), (-1e-6, passed[token])):
            moved = logits.clone()
            moved[token] += towards * (margins[token] + step)
            assert decide(moved[None], tokens[token : token + 1], the_rule).passed_N.item() == expected
