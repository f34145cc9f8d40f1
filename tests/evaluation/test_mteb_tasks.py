"""mteb searches with our index, and both evaluations say the same."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beir_folders import QRELS, write_beir
from embedding.pico_expansion import save_pico_base
from fixtures.small_bilingual import train_small
from soju.cli import app
from soju.core.errors import DataError, MissingExtraError, UserError
from soju.data.log import ReadLog
from soju.data.readers import read_beir
from soju.embedding.config import EvaluationSettings
from soju.embedding.embedder import Subject as EmbeddingSubject
from soju.embedding.evaluate import is_embedding_model, measure_models
from soju.evaluation import mteb_tasks
from soju.evaluation.mteb_tasks import METRICS, folder_task, refuse_without_mteb, run_tasks
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.sparse.config import SearchSettings
from soju.sparse.evaluate import MtebSearcher, Subject, search_all


@pytest.fixture(scope="module")
def encoder():
    return train_small()


@pytest.fixture
def searcher(encoder):
    made = MtebSearcher(encoder, name="small", fingerprint="ab" * 32, search=SearchSettings())
    yield made
    made.close()


CORPUS = [{"id": "d1", "title": "vaccine", "text": "people"}, {"id": "d2", "text": "the sea"}, {"id": "d3", "text": ""}]


def test_the_searcher_finds_titles_and_texts_and_gives_falling_scores(searcher):
    searcher.index(CORPUS, task_metadata=None)
    found = searcher.search([{"id": "q1", "text": "백신"}, {"id": "q2", "text": "zzzz"}], top_k=2)
    assert list(found["q1"]) == ["d1"]
    assert found["q1"]["d1"] > 0
    assert found["q2"] == {}


def test_a_new_corpus_replaces_the_old_one_and_closing_leaves_nothing(searcher):
    searcher.index(CORPUS)
    first = Path(searcher._folder.name)
    searcher.index(CORPUS[1:])
    assert not first.exists()
    assert searcher.search([{"id": "q1", "text": "백신"}], top_k=2) == {"q1": {}}
    second = Path(searcher._folder.name)
    searcher.close()
    assert not second.exists()


def test_candidates_of_reranking_tasks_are_refused(searcher):
    searcher.index(CORPUS)
    with pytest.raises(UserError, match="choose a retrieval task"):
        searcher.search([{"id": "q1", "text": "백신"}], top_k=2, top_ranked={"q1": ["d1"]})


def test_without_mteb_the_message_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(mteb_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'soju\[mteb\]'"):
        refuse_without_mteb()


@pytest.mark.slow
def test_mteb_measures_what_our_own_evaluation_measures(tmp_path, encoder):
    pytest.importorskip("mteb")
    folder = write_beir(tmp_path / "five", qrels=(*QRELS, "q3\td2\t1", "q3\td1\t3"))
    encoder.save(tmp_path / "model")
    scores = run_tasks(MtebSearcher.of(str(tmp_path / "model")), [str(folder)], name="model")
    theirs = {score.name: score for score in scores}

    found = read_beir(str(folder), log=ReadLog())
    test_set = RetrievalSet.create("five/test", found.queries, found.documents, found.judgements)
    run = test_set.run_of(search_all(Subject("model", encoder), test_set, depth=1000))
    ours = evaluate(run, test_set, subject="model", metrics=list(METRICS), samples=10)
    assert 0 < ours.measurement("ndcg@10").score.value < 1
    for score in ours.scores:
        assert theirs[score.name].value == pytest.approx(score.value, abs=1e-5), score.name  # mteb rounds
    assert theirs["ndcg@10"].test_set == "five/test"
    assert f"data:{test_set.hash}" in theirs["ndcg@10"].signature
    assert "evaluator:mteb-" in theirs["ndcg@10"].signature


@pytest.mark.slow
def test_what_is_no_task_is_refused(tmp_path, encoder):
    pytest.importorskip("mteb")
    encoder.save(tmp_path / "model")
    model = MtebSearcher.of(str(tmp_path / "model"))
    with pytest.raises(UserError, match="NoSuchTask: neither a folder nor a task of mteb"):
        run_tasks(model, ["NoSuchTask"], name="model")
    with pytest.raises(UserError, match="KLUE-STS: a task of the kind STS; choose one that retrieves texts"):
        run_tasks(model, ["KLUE-STS"], name="model", retrieval_only=True)
    folder = write_beir(tmp_path / "broken", qrels=(*QRELS, "q1\tnowhere\t1"))
    with pytest.raises(DataError, match=r"test\.tsv:7: corpus-id: 'nowhere' is no id"):
        folder_task(folder, "test")


@pytest.mark.slow
def test_a_task_that_cannot_be_fetched_says_what_else_can_be_done(tmp_path, encoder, monkeypatch):
    mteb = pytest.importorskip("mteb")

    def unreachable(self, *_, **__):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(type(mteb.get_task("Ko-StrategyQA")), "load_data", unreachable)
    encoder.save(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"Ko-StrategyQA: .* cannot be fetched from the hub \(no route to the hub\); check"
    ):
        run_tasks(MtebSearcher.of(str(tmp_path / "model")), ["Ko-StrategyQA"], name="model")


@pytest.mark.slow
def test_the_verb_prints_and_writes_the_scores(tmp_path, encoder):
    pytest.importorskip("mteb")
    folder = write_beir(tmp_path / "five", split="dev")
    encoder.save(tmp_path / "model")
    out = tmp_path / "scores.json"
    done = CliRunner().invoke(
        app, ["mteb", str(tmp_path / "model"), str(folder), "--split", "dev", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "five/dev" in done.output
    assert '"recall@1000"' in out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_embedding_model_is_measured_by_mteb_as_by_us(tmp_path):
    pytest.importorskip("mteb")
    base = save_pico_base(tmp_path / "base")
    assert is_embedding_model(str(base))
    folder = write_beir(tmp_path / "five")
    done = CliRunner().invoke(
        app, ["mteb", str(base), str(folder), "--out", str(tmp_path / "scores.json")], catch_exceptions=False
    )
    assert done.exit_code == 0
    theirs = {row["name"]: row for row in json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))}

    settings = EvaluationSettings.model_validate({"retrieval": [{"name": "five", "beir": str(folder)}]})
    measured = measure_models([EmbeddingSubject("base", str(base))], settings)
    ours = next(score for score in measured.scores if score.name == "ndcg@10")
    assert theirs["ndcg@10"]["value"] == pytest.approx(ours.value, abs=1e-5)
    assert theirs["ndcg@10"]["subject"] == "base"


def test_a_sparse_model_and_an_empty_folder_are_no_embedding_models(tmp_path, encoder):
    encoder.save(tmp_path / "model")
    assert not is_embedding_model(str(tmp_path / "model"))
    assert not is_embedding_model(str(tmp_path))


def test_trec_eval_agrees_with_our_metrics_on_graded_judgements():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    documents = {f"d{number}": "text" for number in range(8)}
    judgements = {"q1": {"d1": 3, "d4": 1, "d6": 2}, "q2": {"d0": 1, "d7": 2}}
    run = {"q1": ["d4", "d0", "d1", "d2", "d6"], "q2": ["d3", "d7"]}
    test_set = RetrievalSet.create("eight", {"q1": "a", "q2": "b"}, documents, judgements)
    ours = evaluate(run, test_set, subject="ours", metrics=["ndcg@3", "ndcg@10", "mrr@10", "recall@1", "recall@5"])
    scored = {query: {name: 1.0 / (rank + 1) for rank, name in enumerate(names)} for query, names in run.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.3,10", "recip_rank", "recall.1,5"})
    theirs = evaluator.evaluate(scored)
    names = {"ndcg@3": "ndcg_cut_3", "ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank", "recall@1": "recall_1"}
    for our_name, their_name in {**names, "recall@5": "recall_5"}.items():
        values = ours.measurement(our_name).values.tolist()
        assert values == pytest.approx([theirs[query][their_name] for query in judgements]), our_name
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ours.measurement("ndcg@3").values[0] == pytest.approx((1 + 3 / 2) / ideal)
