import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
from typer.testing import CliRunner

from soju.cli import app
from soju.core.errors import DataError, StoppedError, UserError
from soju.core.language import language_of
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import PASSAGES, TRIPLETS, Document
from soju.sparse import mine as mining
from soju.sparse.indexing import Index
from soju.sparse.mine import ALL_DROPPED, NOTHING_FOUND, POSITIVE_UNKNOWN, mine
from soju.sparse.miners import SparseModel, is_sparse
from soju.sparse.model import load_encoder, model_folder
from soju.sparse.negatives import Choice, Question
from soju.teachers.dense import SentenceTransformerTeacher
from teachers.pico_teacher import save_pico_teacher


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def triplets(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(*texts):
    return [{"ko": ko, "en": en} for ko, en in texts]


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    """Forty of the packaged passages: 160 questions, 80 documents."""
    rows = [asdict(row) for row in islice(read_rows(["samples:passages.heldout"], PASSAGES, log=ReadLog()), 40)]
    return write(tmp_path_factory.mktemp("rows") / "passages.jsonl", rows)


@pytest.fixture(scope="module")
def mined(tmp_path_factory, passages):
    """The passages, mined with the packaged model."""
    out = tmp_path_factory.mktemp("mined") / "triplets.jsonl"
    report, _ = mine([passages], out)
    return out, report


def passage_rows(path):
    return list(read_rows([path], PASSAGES, log=ReadLog()))


def test_mined_rows_are_triplets(mined):
    out, report = mined
    log = ReadLog()
    rows = list(read_rows([str(out)], TRIPLETS, log=log))
    log.raise_if_broken()
    assert len(rows) == report.negatives > 130
    assert {row.pair_type for row in rows} <= {"monolingual", "cross_lingual"}


def test_negatives_answer_another_query_in_the_language_of_the_positive_and_score_lower(mined, passages):
    answers = {query: {row.ko, row.en} for row in passage_rows(passages) for query in (row.query_ko, row.query_en)}
    for row in triplets(mined[0]):
        assert row["negative"] not in answers[row["query"]]
        assert row["positive"] in answers[row["query"]]
        assert language_of(row["negative"]) == language_of(row["positive"])
        assert row["negative_score"] <= 0.95 * row["positive_score"] + 1e-4
        assert row["miner"] == "ko-en-static"
        assert 1 <= row["negative_rank"] <= 100


def test_the_summary_accounts_for_every_question(mined, passages):
    out, report = mined
    summary = json.loads(out.with_name("triplets.summary.json").read_text(encoding="utf-8"))
    assert summary["questions"] == 4 * 40 == summary["mined"] + sum(summary["left"].values())
    assert summary["sources"][passages]["questions"] == 160
    assert sum(summary["kinds"].values()) == summary["negatives"] == report.negatives
    assert len(summary["examples"]) == min(20, sum(summary["left"].values()))
    assert summary["run"]["choice"]["relative"] == 0.95
    assert not out.with_name("triplets.jsonl.parts").exists()


class Killed(BaseException):
    pass


def stop_at(monkeypatch, part, error=Killed):
    done, real = [], mining.mine_part

    def one(*arguments):
        if len(done) == part:
            raise error
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(mining, "mine_part", one)


@pytest.mark.parametrize("part", [0, 2, 4])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, mined, passages, part):
    monkeypatch.setattr(mining, "CHUNK", 35)
    out = tmp_path / "triplets.jsonl"
    with monkeypatch.context() as stopped:
        stop_at(stopped, part)
        with pytest.raises(Killed):
            mine([passages], out)
    assert not out.exists()
    parts = sorted((tmp_path / "triplets.jsonl.parts").glob("0*.json"))
    assert len(parts) == part
    before = [path.stat().st_mtime_ns for path in parts]
    with monkeypatch.context() as watched:
        remaining = []
        real = mining.mine_part
        watched.setattr(mining, "mine_part", lambda *given: remaining.append(1) or real(*given))
        mine([passages], out, resume=True)
    assert len(remaining) == 5 - part
    assert len(before) == part
    assert out.read_bytes() == mined[0].read_bytes()  # which was one part


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_part(tmp_path, mined, passages):
    code = (
        "import os, signal; from pathlib import Path; from soju.sparse import mine as mining\n"
        "mining.CHUNK, real = 35, mining.Parts.write\n"
        "def write(self, number, value):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if number == 3 else real(self, number, value)\n"
        "mining.Parts.write = write\n"
        f"mining.mine(['{passages}'], Path('triplets.jsonl'))\n"
    )
    environment = {**os.environ, "PYTHONUTF8": "1"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "triplets.jsonl.parts").glob("0*.json"))) == 3
    straight = code.replace("number == 3", "False").replace("'))", "'), resume=True)")
    subprocess.run([sys.executable, "-c", straight], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "triplets.jsonl").read_bytes() == mined[0].read_bytes()


def test_another_configuration_does_not_go_on_with_it(tmp_path, monkeypatch, passages):
    out = tmp_path / "triplets.jsonl"
    with monkeypatch.context() as stopped:
        stop_at(stopped, 0)
        with pytest.raises(Killed):
            mine([passages], out)
    with pytest.raises(UserError, match="holds an unfinished run; go on with --resume"):
        mine([passages], out)
    with pytest.raises(UserError, match="depth was 100, is 50"):
        mine([passages], out, depth=50, resume=True)
    with pytest.raises(UserError, match="content was"):
        mine(["samples:passages.heldout"], out, resume=True)


def test_samples_are_drawn_by_seed_whatever_the_parts(tmp_path, monkeypatch, passages):
    def draw(name, seed):
        mine([passages], tmp_path / name, choice=Choice(pick="sample", per_query=2, seed=seed))
        return (tmp_path / name).read_bytes()

    first = draw("first.jsonl", 1)
    monkeypatch.setattr(mining, "CHUNK", 27)
    assert draw("again.jsonl", 1) == first
    assert draw("other.jsonl", 2) != first


def test_an_unlabelled_answer_is_no_negative(tmp_path, passages):
    planted = {f"{row.en} Indeed." for row in passage_rows(passages)}  # no passage of the rows, but answers like one
    corpus = write(tmp_path / "corpus.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(sorted(planted))])
    wrong = {}
    for name, choice in (("all.jsonl", Choice(relative=None)), ("some.jsonl", Choice())):
        mine([passages], tmp_path / name, corpus=[corpus], choice=choice)
        wrong[name] = sum(row["negative"] == f"{row['positive']} Indeed." for row in triplets(tmp_path / name))
    assert wrong["all.jsonl"] > 40
    assert wrong["some.jsonl"] == 0


KITCHEN = pairs(
    ("냄비에 물을 넣고 끓인다.", "Put water into the pot and boil it."),
    ("물은 차갑게 보관해야 한다.", "Water has to be kept cold."),
    ("학교는 아홉 시에 문을 연다.", "The school opens at nine o'clock."),
)


@pytest.mark.parametrize("given", ["rows", "terms"])
def test_a_base_term_is_no_negative_of_its_compound(tmp_path, given):
    terms = [
        {"ko": "증상", "terms": ["symptom"]},
        {"ko": "임상증상", "terms": ["clinical symptom"]},
        {"ko": "임상시험", "terms": ["clinical trial"]},
        {"ko": "병원", "terms": ["hospital"]},
    ]
    rows = write(tmp_path / "terms.jsonl", terms)
    if given == "terms":
        asked = [
            {"query": row["ko"], "positive": row["terms"][0], "negative": "hotel"}
            | {"pair_type": "single_term", "difficulty": "easy"}
            for row in terms
        ]
        rows = write(tmp_path / "triplets.jsonl", asked)
    report, _ = mine(
        [rows],
        tmp_path / "out.jsonl",
        miner="bm25",
        choice=Choice(relative=None, per_query=9),
        terms=[str(tmp_path / "terms.jsonl")] if given == "terms" else (),
    )
    found = {(row["query"], row["negative"]) for row in triplets(tmp_path / "out.jsonl")}
    assert ("임상증상", "clinical trial") in found
    assert not {("임상증상", "symptom"), ("증상", "clinical symptom")} & found
    assert report.dropped["base term or compound"] >= 2


def test_a_triplet_gets_another_negative_and_keeps_its_type(tmp_path):
    rows = [
        {"query": "냄비에 물을 끓인다", "positive": "물을 끓이세요", "pair_type": "cross_lingual"},
        {"query": "냄비에 국을 끓인다", "positive": "국을 끓이세요", "pair_type": "monolingual"},
    ]
    path = write(tmp_path / "rows.jsonl", [{**row, "negative": "버스가 온다", "difficulty": "easy"} for row in rows])
    mine([path], tmp_path / "out.jsonl", miner="bm25", choice=Choice(relative=None))
    assert [(row["pair_type"], row["negative"], row["difficulty"]) for row in triplets(tmp_path / "out.jsonl")] == [
        ("cross_lingual", "국을 끓이세요", "hard"),
        ("monolingual", "물을 끓이세요", "hard"),
    ]


def test_without_a_filter_the_scores_are_those_of_the_miner(tmp_path):
    rows = write(tmp_path / "pairs.jsonl", KITCHEN)
    mine([rows], tmp_path / "out.jsonl", choice=Choice(relative=None))
    mine([rows], tmp_path / "deep.jsonl", choice=Choice(relative=9.0))
    assert triplets(tmp_path / "out.jsonl") == triplets(tmp_path / "deep.jsonl")


def test_bm25_asks_in_another_language_with_a_dictionary_only(tmp_path):
    rows = write(tmp_path / "pairs.jsonl", KITCHEN)
    with pytest.raises(UserError, match=r"is in another language than its answer.*--terms"):
        mine([rows], tmp_path / "out.jsonl", miner="bm25")
    terms = write(tmp_path / "terms.jsonl", [{"ko": "물", "terms": ["water"]}])
    report, _ = mine([rows], tmp_path / "more.jsonl", miner="bm25", terms=[terms])
    found = {row["query"]: row["negative"] for row in triplets(tmp_path / "more.jsonl")}
    assert found[KITCHEN[0]["ko"]] == KITCHEN[1]["en"]
    assert KITCHEN[2]["ko"] not in found  # no word of it is in the dictionary
    assert report.left[NOTHING_FOUND] == 2


def test_a_positive_unlike_its_query_gives_no_negative(tmp_path):
    rows = write(tmp_path / "pairs.jsonl", [*KITCHEN, *pairs(("쿄쿄쿗 뺘뺘", "Water can be cold."))])
    report, _ = mine([rows], tmp_path / "out.jsonl")
    assert report.left[POSITIVE_UNKNOWN] + report.left[NOTHING_FOUND] >= 1
    assert all("뺘" not in row["query"] for row in triplets(tmp_path / "out.jsonl"))


def question(query):
    return Question(query, "", "monolingual")


def test_the_sparse_miner_ranks_and_scores_as_the_index_does(tmp_path, passages):
    rows = passage_rows(passages)
    documents, queries = [row.en for row in rows], [row.query_ko for row in rows]
    folder = model_folder("ko-en-static")
    ranker = SparseModel(folder).over(documents, ())
    rankings, scores = ranker.search([question(query) for query in queries], 10)
    assert max(len(document.split()) for document in documents) <= 120  # an index would cut longer ones
    numbered = [Document(str(number), document) for number, document in enumerate(documents)]
    index = Index.build(numbered, folder, tmp_path / "index").vectors
    hits = index.search(load_encoder(folder).encode_queries(queries), 10)
    assert [list(map(str, ranking)) for ranking in rankings] == [[hit.document_id for hit in found] for found in hits]
    for ours, found in zip(scores, hits, strict=True):
        np.testing.assert_allclose(ours, [hit.score for hit in found], rtol=1e-5)
    for ours, theirs in zip(ranker.score([question(query) for query in queries], rankings), scores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


WORDS = pairs(
    ("검색 엔진", "search engine"),
    ("물", "water"),
    ("엔진 물", "engine water"),
    ("검색 검색 물", "search search water"),
)


def test_the_dense_miner_ranks_by_cosine(tmp_path, monkeypatch):
    monkeypatch.setattr("soju.sparse.miners._BLOCK", 3)  # several blocks, the last not full
    folder = save_pico_teacher(tmp_path / "teacher")
    assert not is_sparse(folder)
    rows = write(tmp_path / "pairs.jsonl", WORDS)
    cache = tmp_path / "cache"
    choice = Choice(relative=None, max_score=2.0, per_query=9)
    mine([rows], tmp_path / "out.jsonl", miner=str(folder), choice=choice, cache=cache)
    teacher = SentenceTransformerTeacher(str(folder))
    english = [row["en"] for row in WORDS]
    for row in WORDS:
        found = [r for r in triplets(tmp_path / "out.jsonl") if r["query"] == row["ko"]]
        others = [text for text in english if text != row["en"]]
        cosines = teacher.embed([row["ko"]]) @ teacher.embed(others).T
        allowed = {text for text in others if text not in row["en"] and row["en"] not in text}
        expected = [others[n] for n in np.argsort(-cosines[0], kind="stable")]
        assert [r["negative"] for r in found] == [text for text in expected if text in allowed]
        for r in found:
            assert r["negative_score"] == pytest.approx(cosines[0][others.index(r["negative"])], abs=1e-4)
    assert any(cache.rglob("*.npy"))


def test_a_dense_model_filters_what_bm25_found(tmp_path):
    folder = save_pico_teacher(tmp_path / "teacher")
    rows = write(tmp_path / "pairs.jsonl", WORDS)
    terms = write(tmp_path / "terms.jsonl", [{"ko": "물", "terms": ["water"]}])
    setting = {"miner": "bm25", "terms": [terms], "filter_model": str(folder), "cache": tmp_path / "cache"}
    with pytest.raises(UserError, match="not one negative passed"):
        mine([rows], tmp_path / "out.jsonl", choice=Choice(relative=None, max_score=-1.0), **setting)
    report, _ = mine([rows], tmp_path / "all.jsonl", choice=Choice(relative=5.0), **setting)
    assert report.negatives
    assert all(-1 <= row["negative_score"] <= 1 for row in triplets(tmp_path / "all.jsonl"))


def test_when_every_candidate_is_dropped_the_summary_says_where(tmp_path):
    rows = write(tmp_path / "pairs.jsonl", KITCHEN)
    report, _ = mine([rows], tmp_path / "out.jsonl", choice=Choice(relative=0.2))
    assert report.mined < 6
    assert report.left[ALL_DROPPED] >= 1
    assert report.examples[0]["source"] == rows
    assert report.sources[rows]["questions"] == 6


def test_what_cannot_be_mined_is_refused(tmp_path, passages):
    documents = write(tmp_path / "documents.jsonl", [{"id": "1", "text": "물"}])
    with pytest.raises(DataError, match=r"documents ask nothing; give pairs.*--corpus"):
        mine([documents], tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"name the last argument OUT.jsonl"):
        mine([passages], tmp_path / "out.tsv")
    with pytest.raises(UserError, match="BM25 cannot tell answers from shared words"):
        mine([passages], tmp_path / "out.jsonl", filter_model="bm25")
    with pytest.raises(UserError, match="nothing is filtered"):
        mine([passages], tmp_path / "out.jsonl", filter_model="ko-en-static", choice=Choice(relative=None))
    with pytest.raises(UserError, match="not a model folder"):
        mine([passages], tmp_path / "out.jsonl", miner=str(tmp_path))
    alike = write(tmp_path / "terms.jsonl", [{"ko": "책", "terms": ["도서"]}])
    with pytest.raises(UserError, match="no row asks anything"):
        mine([alike], tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.*"))


def test_the_verb_tells_what_it_did(tmp_path, monkeypatch):
    rows = write(tmp_path / "pairs.jsonl", KITCHEN)
    out = str(tmp_path / "out.jsonl")
    result = CliRunner().invoke(app, ["mine", rows, out])
    assert result.exit_code == 0, result.output
    assert "of 6 questions" in result.stdout
    assert "known positive 6" in result.stdout
    for arguments, words in (
        ([out], "ROWS... OUT.jsonl"),
        ([rows, out], "is there already"),
        ([rows, out, "--no-filter", "--max-score", "1"], "contradict"),
        ([rows, out, "--relative", "-1"], "relative"),
    ):
        error = CliRunner().invoke(app, ["mine", *arguments]).exception
        assert isinstance(error, UserError)
        assert words in str(error)
    stop_at(monkeypatch, 0, KeyboardInterrupt)
    error = CliRunner().invoke(app, ["mine", rows, str(tmp_path / "new.jsonl")]).exception
    assert isinstance(error, StoppedError)
    assert error.exit_code == 130
