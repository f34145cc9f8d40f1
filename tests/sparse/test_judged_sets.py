"""Test sets in the layout of BEIR, from the configuration to the scores."""

import pytest

from beir_folders import CORPUS, QRELS, QUERIES, write_beir
from fixtures.small_bilingual import train_small
from soju.core.config import validate
from soju.core.errors import ConfigError, DataError, UserError
from soju.sparse.config import StaticConfig
from soju.sparse.evaluate import METRICS, Subject, score
from soju.sparse.finish import example_searches
from soju.sparse.recipe import read_run_data


@pytest.fixture(scope="module")
def encoder():
    return train_small()


@pytest.fixture
def config_of(tmp_path):
    (tmp_path / "train.tsv").write_text("물을 끓인다\tboil the water\n밥을 먹는다\teat the rice\n", encoding="utf-8")

    def make(*, on_error="stop", more_metrics=(), **test_set):
        values = {
            "recipe": "splade",
            "mode": "static",
            "name": "judged",
            "data": {"root": tmp_path, "pairs": ["train.tsv"], "on_error": on_error},
            "evaluation": {
                "sets": [{"name": "five", "beir": "five"} | test_set],
                "more_metrics": more_metrics,
                "bootstrap_samples": 100,
                "latency_queries": 2,
            },
        }
        return validate(values, StaticConfig, place="test")

    return make


def test_scores_follow_the_judgements_and_the_whole_corpus_is_searched(tmp_path, config_of, encoder):
    write_beir(tmp_path / "five")
    config = config_of(more_metrics=["recall@1000", "ndcg@2"])
    data = read_run_data(config)
    (texts,) = data.evaluation
    assert texts.directions["test"].name == "five/test"
    assert len(texts.directions["test"].documents) == 5

    measured = score([Subject("ours", encoder)], data, config, tmp_path)
    ours = {
        item.name: item.value for item in measured.scores if item.subject == "ours" and item.test_set == "five/test"
    }
    assert set(ours) == {*METRICS, "recall@1000", "ndcg@2"}
    # 백신 finds d1 (gain 2, the word stands there twice) before d5 (gain 1); 학교 finds d3, its only answer.
    assert ours["recall@1"] == (1 / 2 + 1) / 2
    assert ours["recall@10"] == ours["recall@1000"] == ours["ndcg@2"] == ours["mrr@10"] == 1.0
    (curve,) = measured.figures[0]["series"]
    assert curve["name"] == "five/test"
    assert curve["y"][-1] == 1.0


def test_the_examples_search_the_whole_corpus_under_its_ids(tmp_path, config_of, encoder):
    class Folder:
        folder = tmp_path / "run"

    write_beir(tmp_path / "five")
    config = config_of()
    Folder.folder.mkdir()
    encoder.save(tmp_path / "model")
    settings = config.evaluation.model_copy(update={"examples": ("학교",)})
    (found,) = example_searches(encoder, read_run_data(config).evaluation, settings, Folder, tmp_path / "model")
    assert [hit["document_id"] for hit in found["hits"]] == ["five-d3"]


def test_broken_judgements_stop_the_run_or_are_left_out(tmp_path, config_of):
    write_beir(tmp_path / "five", qrels=(*QRELS, "q3\tnowhere\t1"))
    with pytest.raises(DataError, match=r"five/qrels/test\.tsv:7: corpus-id: 'nowhere' is no id"):
        read_run_data(config_of())
    data = read_run_data(config_of(on_error="skip"))
    assert data.training.log.refused == 1
    assert list(data.evaluation[0].directions["test"].queries) == ["q1", "q2"]


def test_another_split_names_the_direction(tmp_path, config_of):
    write_beir(tmp_path / "five", split="dev")
    assert list(read_run_data(config_of(split="dev")).evaluation[0].directions) == ["dev"]


def test_training_may_hold_documents_that_answer_nothing_but_no_answers(tmp_path, config_of):
    write_beir(tmp_path / "five", corpus=(*CORPUS, '{"_id": "d6", "text": "boil the water"}'))
    read_run_data(config_of())
    write_beir(
        tmp_path / "five",
        corpus=(*CORPUS, '{"_id": "d6", "text": "boil the water"}'),
        qrels=(*QRELS, "q3\td6\t1"),
    )
    with pytest.raises(UserError, match="of five also stand in the training data"):
        read_run_data(config_of())


def test_fewer_than_two_answered_queries_are_refused(tmp_path, config_of):
    write_beir(tmp_path / "five", queries=QUERIES, qrels=QRELS[:2])
    with pytest.raises(UserError, match="five: fewer than two rows with an answer"):
        read_run_data(config_of())


@pytest.mark.parametrize(
    ("test_set", "words"),
    [
        ({"beir": None}, "give one of pairs, passages.* and beir"),
        ({"pairs": ["p.tsv"]}, "give one of pairs, passages.* and beir"),
        ({"beir": None, "pairs": ["p.tsv"], "split": "dev"}, "split is about beir"),
    ],
)
def test_a_set_is_of_one_kind(config_of, test_set, words):
    with pytest.raises(ConfigError, match=words):
        config_of(**test_set)


def test_unknown_metrics_are_refused(config_of):
    with pytest.raises(ConfigError, match="expected ndcg@k, mrr@k, recall@k"):
        config_of(more_metrics=["map@10"])
