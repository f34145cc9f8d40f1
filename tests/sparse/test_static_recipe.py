"""The recipe from end to end on our own samples, once a session, and what it leaves behind."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from fixtures.needs import DATA, needs_data
from soju.core.config import apply_overrides, parse_yaml, preset_text, validate
from soju.core.errors import DataError, UserError
from soju.core.files import verify_manifest
from soju.core.run import Run
from soju.sparse.config import StaticConfig
from soju.sparse.export.formats import read_term_table
from soju.sparse.indexing import Index, expand, read_documents
from soju.sparse.recipe import read_run_data
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.static.recipe import run


def config_of(preset: str, *overrides: str) -> StaticConfig:
    values = apply_overrides(parse_yaml(preset_text(preset), place=preset), overrides)
    return validate(values, StaticConfig, place=preset)


def sample_config(*overrides: str) -> StaticConfig:
    quick = ("evaluation.bootstrap_samples=100", "evaluation.latency_queries=5")
    return config_of("splade-static-samples", *quick, *overrides)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "samples"
    config = sample_config()
    run_dir = Run.create(folder, config_text="as given", config=config, seed=config.seed)
    made = run(config, run_dir, workers=1)
    assert made.report.is_file()
    assert made.model.terms
    return folder


def score(folder: Path, test_set: str, subject: str, name: str) -> float:
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    (found,) = [s["value"] for s in scores if (s["test_set"], s["subject"], s["name"]) == (test_set, subject, name)]
    return found


def test_a_run_leaves_everything_the_report_promises(finished):
    for name in ("config.yaml", "resolved.yaml", "environment.json", "data.json", "scores.json", "comparisons.json"):
        assert (finished / name).stat().st_size > 0
    for name in ("report.html", "report.md", "final/README.md", "exports/translations.tsv", "plots/likelihood.png"):
        assert (finished / name).stat().st_size > 0
    verify_manifest(finished / "final")


@pytest.mark.parametrize("direction", ["ko-en", "en-ko"])
def test_across_languages_it_beats_bm25_and_the_dictionary_on_held_out_passages(finished, direction):
    ours, bm25, dictionary = (
        score(finished, f"samples.heldout/{direction}", subject, "recall@10")
        for subject in ("soju static", "BM25", "dictionary")
    )
    assert ours > dictionary > bm25
    assert ours >= 0.65


@pytest.mark.parametrize(("direction", "at_least"), [("ko-ko", 0.88), ("en-en", 0.90)])
def test_within_a_language_it_finds_what_a_searcher_expects(finished, direction, at_least):
    assert score(finished, f"samples.heldout/{direction}", "soju static", "recall@10") >= at_least


def test_every_direction_is_compared_with_every_baseline(finished):
    comparisons = json.loads((finished / "comparisons.json").read_text(encoding="utf-8"))
    pairs = {(c["test_set"], c["baseline"]) for c in comparisons if c["metric"] == "recall@10"}
    assert len(pairs) == 4 * 3


def test_the_reported_recall_is_what_a_search_of_the_users_finds(finished, tmp_path):
    rows = [json.loads(line) for line in preset_heldout().splitlines()]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": r["id"], "text": r["en"]}) + "\n" for r in rows), encoding="utf-8")
    index = Index.build(read_documents([str(corpus)]), finished, tmp_path / "index")
    recall = np.mean([r["id"] in [hit.document_id for hit in index.search(r["query_ko"], k=10)] for r in rows])
    assert recall == pytest.approx(score(finished, "samples.heldout/ko-en", "soju static", "recall@10"))


def preset_heldout() -> str:
    return (files("soju") / "samples/passages.heldout.jsonl").read_text(encoding="utf-8")


def test_the_exported_table_reads_back_as_the_models_translations(finished):
    encoder = StaticEncoder.load(finished / "final")
    table = read_term_table(finished / "exports" / "translations.tsv", encoder.terms)
    assert (table != encoder.translations_VV).nnz == 0


def test_the_same_rows_give_the_same_model(finished, tmp_path):
    config = sample_config("evaluation.sets=[]", "evaluation.terms=[]")
    run(config, Run.create(tmp_path / "again", config_text="", config=config, seed=1), workers=2)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / "final" / name).read_bytes() == (finished / "final" / name).read_bytes()


def test_a_korean_word_lights_its_english_terms_and_an_english_word_its_korean_ones(finished):
    encoder = StaticEncoder.load(finished / "final")
    heart, mountain = expand(encoder, ["심장", "mountain"])
    assert {term.term for term in heart.terms} >= {"심장", "heart"}
    assert {term.term for term in mountain.terms} >= {"mountain", "산"}


def test_documents_added_later_are_found_and_the_index_carries_its_model(finished, tmp_path):
    first, more = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"id": "tea", "text": "Green tea is brewed with warm water."}\n', encoding="utf-8")
    more.write_text('{"id": "heart", "text": "심장은 피를 온몸으로 보낸다."}\n', encoding="utf-8")
    Index.build(read_documents([str(first)]), finished, tmp_path / "index")
    assert Index.open(tmp_path / "index").add(read_documents([str(more)])) == 1
    (hit,) = Index.open(tmp_path / "index").search("heart")
    assert hit.document_id == "heart"
    assert "심장" in {term.term for term in hit.matched}


def test_an_index_refuses_another_model(finished, tmp_path):
    Index.build(["tea"], finished, tmp_path / "index")
    with pytest.raises(UserError, match="another model"):
        Index.open(tmp_path / "index", "ko-en-static")


def test_the_index_of_a_run_can_be_searched_as_it_lies(finished):
    (hit,) = Index.open(finished / "index").search("심장 혈관이 막혔을 때 가슴 통증", k=1)
    assert "heart" in {term.term for term in hit.matched}


def test_an_index_weighs_documents_as_the_run_that_scored_the_model(tmp_path):
    config = sample_config("search.k1=0.4", "search.prior_documents=7", "evaluation.sets=[]", "evaluation.terms=[]")
    run(config, Run.create(tmp_path / "run", config_text="", config=config, seed=1), workers=1)
    index = Index.build(["tea"], tmp_path / "run", tmp_path / "index")
    weighting = index.vectors.description.settings.weighting
    assert (weighting.kind, weighting.k1, weighting.prior_documents) == ("bm25", 0.4, 7)


def test_source_rows_count_what_was_trained_on_and_nothing_else(tmp_path):
    rows = [
        {"ko": "물", "terms": ["water"], "src": ["free"]},
        {"ko": "불", "terms": ["fire"], "src": ["free", "other"]},
        {"ko": "산", "terms": ["mountain"]},
    ]
    terms = tmp_path / "terms.jsonl"
    terms.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = sample_config(f"data.terms=[{terms}]", "data.term_sources=[free]", "evaluation.terms=[]")
    data = read_run_data(config)
    assert [row.ko for row in data.training.terms] == ["물", "산"]
    assert data.training.source_rows == {"samples:passages.train": 374, "free": 1, str(terms): 1}


def test_the_packaged_models_card_knows_the_licence_of_every_source():
    import soju

    folder = Path(soju.__file__).parent / "packaged" / "ko-en-static"
    verify_manifest(folder)
    assert "see its owner" not in (folder / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000


def test_evaluation_texts_in_the_training_data_are_refused():
    config = sample_config("data.passages=[samples:passages.train, samples:passages.heldout]")
    with pytest.raises(UserError, match=r"of samples\.heldout also stand in the training data"):
        read_run_data(config)


def test_broken_rows_stop_the_run_before_anything_is_trained(tmp_path):
    broken = tmp_path / "terms.jsonl"
    broken.write_text('{"ko": "", "terms": ["x"]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"terms\.jsonl:1: ko: .*empty"):
        read_run_data(sample_config(f"data.terms=[{broken}]"))


def test_held_out_head_words_are_not_trained_on():
    data = read_run_data(sample_config("data.held_out_terms=0.1", "evaluation.terms=[]"))
    trained = {row.ko for row in data.training.terms}
    assert 100 < len(data.training.unseen_terms) < 280
    assert trained.isdisjoint(row.ko for row in data.training.unseen_terms)


@needs_data
@pytest.mark.parametrize("preset", ["splade-static", "splade-static-packaged"])
def test_every_real_data_preset_reads_its_data_without_a_problem(preset):
    data = read_run_data(config_of(preset, f"data.root={DATA}"))
    assert len(data.training.pairs) > 90_000
    assert {texts.name for texts in data.evaluation} >= {"parallel.dev", "mkqa.dev_half"}


@needs_data
@pytest.mark.slow
def test_the_real_data_preset_reaches_the_published_recall(tmp_path):
    config = config_of("splade-static", f"data.root={DATA}", "evaluation.bootstrap_samples=100")
    run(config, Run.create(tmp_path / "run", config_text="", config=config, seed=1))
    floors = {
        ("parallel.dev", "ko-en"): 0.970,
        ("parallel.dev", "en-ko"): 0.965,
        ("mkqa.dev_half", "ko-en"): 0.880,
        ("mkqa.dev_half", "en-ko"): 0.850,
    }
    for (name, direction), floor in floors.items():
        assert score(tmp_path / "run", f"{name}/{direction}", "soju static", "recall@10") >= floor
