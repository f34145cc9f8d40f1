"""Keyed noise: known values, uniformity, independence; draws follow the distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from soju.speculative_kd.noise import Role, draw, keyed_uniform, mix, row_keys

HALF = torch.tensor([0.5], dtype=torch.float64)


def test_mix_is_splitmix64():
    # The first three outputs of the published generator with seed 0; its state advances by a constant.
    states = np.array([0, 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], dtype=np.uint64)
    assert [hex(x) for x in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_uniform_is_the_chain_worked_with_plain_integers():
    def step(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = int(row_keys(["tradition_001"])[0])
    state = step(step(step(step(step(7) ^ 2) ^ key) ^ 13) ^ 1)
    assert keyed_uniform(7, 2, row_keys(["tradition_001"]), [13], Role.REPLACE)[0] == (state >> 11) / 2**53


def test_ids_are_hashed_by_their_text():
    assert row_keys([7]) == row_keys(["7"])
    assert len(set(row_keys(["a", "b", "가", "", 1, 10, 100]))) == 7
    # Fixed for good, so that a resume elsewhere has the same noise.
    assert row_keys(["tradition_001"])[0] == int.from_bytes(bytes.fromhex("16548c2731e8a691"), "little")  # b2sum -l 64


def test_uniform_does_not_depend_on_the_batch_or_its_order():
    keys = row_keys(range(50))
    together = keyed_uniform(1, 0, keys[:, None], np.arange(20), Role.PROPOSE)
    assert together.shape == (50, 20)
    order = np.random.default_rng(0).permutation(50)
    shuffled = keyed_uniform(1, 0, keys[order][:, None], np.arange(20), Role.PROPOSE)
    assert (shuffled == together[order]).all()
    alone = [[keyed_uniform(1, 0, keys[b : b + 1], [p], Role.PROPOSE)[0] for p in range(20)] for b in range(50)]
    assert (together == alone).all()


@pytest.mark.parametrize("varied", ["seed", "epoch", "row", "position", "role"])
def test_uniform_passes_chi_square_along_each_part_of_its_key(varied):
    n = 20_000
    keys = row_keys(range(n))
    numbers = {
        "seed": lambda: np.array([keyed_uniform(s, 0, keys[:1], [0], Role.PROPOSE)[0] for s in range(n // 10)]),
        "epoch": lambda: np.array([keyed_uniform(0, e, keys[:1], [0], Role.PROPOSE)[0] for e in range(n // 10)]),
        "row": lambda: keyed_uniform(0, 0, keys, 0, Role.PROPOSE),
        "position": lambda: keyed_uniform(0, 0, keys[:1], np.arange(n), Role.PROPOSE),
        "role": lambda: np.concatenate([keyed_uniform(0, 0, keys, 0, role) for role in Role]),
    }[varied]()
    assert 0 <= numbers.min() <= numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = len(numbers) / 50
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert chi2.ppf(0.0005, 49) < statistic < chi2.ppf(0.9995, 49)


@pytest.mark.parametrize("varied", ["position", "role", "epoch"])
def test_neighbours_are_independent(varied):
    keys = row_keys(range(20_000))
    first = keyed_uniform(0, 0, keys, 5, Role.PROPOSE)
    second = {
        "position": keyed_uniform(0, 0, keys, 6, Role.PROPOSE),
        "role": keyed_uniform(0, 0, keys, 5, Role.REPLACE),
        "epoch": keyed_uniform(0, 1, keys, 5, Role.PROPOSE),
    }[varied]
    counts, _, _ = np.histogram2d(first, second, bins=8, range=[(0, 1), (0, 1)])
    expected = len(keys) / 64
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9995, 63)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / len(keys) ** 0.5


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    found = [int(draw(logits, 1.0, torch.tensor([u], dtype=torch.float64))) for u in (0, 0.09, 0.11, 0.29, 0.31, 0.61)]
    assert found == [0, 0, 1, 1, 2, 3]
    assert int(draw(logits, 1.0, torch.tensor([1 - 2**-53], dtype=torch.float64))) == 3


def test_draw_never_takes_a_token_without_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    numbers = torch.linspace(0, 1 - 2**-53, 101, dtype=torch.float64)
    assert set(draw(logits.expand(101, 5), 0.7, numbers).tolist()) == {1, 3}


def test_temperature_divides_the_logits():
    # At temperature 0.5 odds of 1 : 3 become 1 : 9.
    logits = torch.tensor([[1.0, 3.0]]).log()
    at = [int(draw(logits, 0.5, torch.tensor([u], dtype=torch.float64))) for u in (0.0999, 0.1001)]
    assert at == [0, 1]
    assert int(draw(logits, 0, HALF * 0)) == 1


def test_draws_follow_the_distribution():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    uniform = torch.from_numpy(keyed_uniform(3, 0, row_keys(range(30_000)), 4, Role.PROPOSE))
    counts = torch.bincount(draw(logits.expand(30_000, 30), 0.7, uniform), minlength=30).double()
    expected = torch.softmax(logits[0].double() / 0.7, -1) * 30_000
    used = expected > 5
    assert float(((counts - expected) ** 2 / expected)[used].sum()) < chi2.ppf(0.9995, int(used.sum()) - 1)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_draw_marks_logits_that_are_not_finite(bad, temperature):
    logits = torch.tensor([[0.0, bad], [0.0, 1.0]])
    assert draw(logits, temperature, HALF.expand(2)).tolist() == [-1, 1]
