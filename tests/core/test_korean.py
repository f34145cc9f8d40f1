from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import kiwipiepy

from soju.core import language as korean


def test_two_threads_that_ask_at_once_share_one_analyser(monkeypatch):
    made = []

    class SlowKiwi:
        def __init__(self, num_workers):
            made.append(num_workers)
            meet.wait(0.2) if len(made) > 1 else None

    meet = Barrier(2)
    monkeypatch.setattr(kiwipiepy, "Kiwi", SlowKiwi)
    monkeypatch.setattr(korean, "_kiwis", {})

    def ask(_):
        meet.wait()
        return korean.shared_kiwi(3)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(ask, range(2))
    assert first is second
    assert made == [3]


def test_one_analyser_answers_two_threads_as_it_answers_one():
    kiwi = korean.shared_kiwi(1)
    assert korean.shared_kiwi(1) is kiwi
    texts = ["학교에 갔다", "검색 엔진을 만든다", "사과가 맛있다"] * 20

    def forms(text):
        return [(token.form, token.tag, token.start, token.len) for token in kiwi.tokenize(text)]

    alone = [forms(text) for text in texts]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(forms, texts)) == alone
