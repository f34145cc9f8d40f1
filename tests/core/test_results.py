import pytest

from soju import __version__
from soju.core.results import Interval, Score, signature


def test_a_signature_is_sorted_by_key_and_ends_with_the_version():
    assert signature(metric="ndcg", k=10) == f"k:10|metric:ndcg|version:soju-{__version__}"


def test_a_signature_does_not_depend_on_the_order_of_settings():
    assert signature(a=1, b=2) == signature(b=2, a=1)


@pytest.mark.parametrize("other", [{"k": 11}, {"k": 10, "test": "dev"}, {}])
def test_other_settings_have_another_signature(other):
    assert signature(**other) != signature(k=10)


@pytest.mark.parametrize("interval", [None, Interval(0.25, 0.75), Interval(0.1, 0.2, level=0.9)])
def test_a_score_survives_being_plain_values(interval):
    score = Score("recall@10", "bm25", "dev/ko-en", 0.5, "fraction", True, "k:10", interval)
    assert Score.from_json(score.to_json()) == score
