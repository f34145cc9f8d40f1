import pytest

from soju.data.statistics import held_out

KEYS = [f"문서 {number}" for number in range(10_000)]


def test_the_decision_of_a_key_never_changes():
    assert [key for key in range(8) if held_out(str(key), seed=7, share=0.3)] == [2, 4, 5]


def test_about_the_asked_share_is_held_out():
    assert sum(held_out(key, seed=1, share=0.1) for key in KEYS) == pytest.approx(1000, abs=100)


def test_a_larger_share_keeps_what_a_smaller_one_held_out():
    assert all(held_out(key, seed=1, share=0.2) for key in KEYS if held_out(key, seed=1, share=0.1))


def test_another_seed_gives_an_independent_split():
    both = sum(held_out(key, seed=1, share=0.1) and held_out(key, seed=2, share=0.1) for key in KEYS)
    assert both == pytest.approx(100, abs=40)


def test_nothing_or_everything_may_be_held_out():
    assert not any(held_out(key, seed=1, share=0.0) for key in KEYS)
    assert all(held_out(key, seed=1, share=1.0) for key in KEYS)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        held_out("a", seed=1, share=share)
