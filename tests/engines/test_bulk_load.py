import json

import pytest

from soju.core.errors import UserError
from soju.search.remote import Answer, BulkLoader, BulkSettings, DeadLetters, Item, RequestRefusedError


class Script:
    """Answers as told: a status for a whole request, or one after the other for a document; else 201."""

    def __init__(self, *requests, documents=None):
        self.requests, self.documents, self.sent, self.waits = list(requests), documents or {}, [], []

    def __call__(self, items):
        self.sent.append([item.id for item in items])
        if self.requests:
            raise RequestRefusedError(self.requests.pop(0), "told to")
        return [
            Answer(self.documents.get(item.id, [201]).pop(0) if item.id in self.documents else 201) for item in items
        ]

    def load(self, tmp_path, count=8, **settings):
        settings = BulkSettings(**{"documents": 8, "first_wait": 1, **settings})
        with DeadLetters(tmp_path / "dead.jsonl") as dead:
            loader = BulkLoader(self, dead, settings, sleep=self.waits.append)
            return loader.load(Item(f"d{number}", {"n": number}) for number in range(count))


def test_a_busy_request_is_halved_and_waits_twice_as_long_every_time(tmp_path):
    script = Script(429, 503, 0)
    report = script.load(tmp_path)
    assert [len(ids) for ids in script.sent] == [8, 4, 2, 1, 2, 3, 2]  # grows by one tenth, at least one, when taken
    assert script.waits == [1, 2, 4]
    assert (report.stored, report.failed, report.waits) == (8, 0, 3)
    assert not (tmp_path / "dead.jsonl").exists()


def test_no_wait_is_longer_than_the_longest(tmp_path):
    script = Script(429, 429, 429, 429)
    script.load(tmp_path, longest_wait=3)
    assert script.waits == [1, 2, 3, 3]


def test_of_an_answered_request_only_busy_documents_are_sent_again(tmp_path):
    script = Script(documents={"d2": [429, 429, 201], "d5": [400]})
    report = script.load(tmp_path)
    assert script.sent[1:] == [["d2"], ["d2"]]
    assert script.waits == [1, 2]
    assert (report.stored, report.failed, report.first_failed) == (7, 1, ["d5"])
    (row,) = (tmp_path / "dead.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row) == {"id": "d5", "status": 400, "reason": "", "body": {"n": 5}}


def test_a_document_that_stays_busy_fails_after_its_attempts(tmp_path):
    script = Script(documents={"d0": [429] * 9})
    report = script.load(tmp_path, attempts=3)
    assert (report.stored, report.failed) == (7, 1)
    assert sum(ids.count("d0") for ids in script.sent) == 3


def test_a_bad_request_is_halved_without_waiting_until_the_bad_document_is_alone(tmp_path):
    class OneBad(Script):
        def __call__(self, items):
            self.sent.append([item.id for item in items])
            if any(item.id == "d3" for item in items):
                raise RequestRefusedError(400, "malformed")
            return [Answer(201)] * len(items)

    script = OneBad()
    report = script.load(tmp_path)
    assert (report.stored, report.failed, report.first_failed, script.waits) == (7, 1, ["d3"], [])


def test_an_engine_that_takes_nothing_ends_the_load(tmp_path):
    with pytest.raises(UserError, match="refused 3 requests in a row"):
        Script(*[503] * 9).load(tmp_path, attempts=3)


def test_requests_are_bounded_in_bytes_as_well(tmp_path):
    script = Script()
    script.load(tmp_path, megabytes=20e-6)  # 20 bytes: two bodies of 8
    assert [len(ids) for ids in script.sent] == [2, 2, 2, 2]


def test_what_must_not_be_sent_is_a_dead_letter_at_once(tmp_path):
    script = Script()
    with DeadLetters(tmp_path / "dead.jsonl") as dead:
        loader = BulkLoader(script, dead)
        report = loader.load([Item("a", {}, "no good"), Item("b", {})])
    assert script.sent == [["b"]]
    assert (report.stored, report.failed) == (1, 1)
    assert json.loads((tmp_path / "dead.jsonl").read_text(encoding="utf-8"))["reason"] == "no good"
