"""Qdrant's local mode is Qdrant's own code without a server, so these rankings are its own."""

import json

import pytest

from engines.engine_models import QUERIES, exact_search, ids
from soju.core.errors import UserError
from soju.search.qdrant import QdrantEngine
from soju.sparse.indexing import connect, load_index, search_engine


@pytest.fixture
def qdrant():
    engine = QdrantEngine.connect(":memory:")
    yield engine
    engine.close()


def test_qdrant_ranks_as_the_exact_engine(qdrant, model, corpus, tmp_path):
    loaded = load_index(model, [corpus], "same", qdrant, dead_letters=tmp_path / "dead.jsonl")
    assert loaded.report.stored == loaded.facts.passages > loaded.facts.documents == 80
    for text, exact in zip(QUERIES, exact_search(model, corpus, tmp_path / "index", k=15), strict=True):
        found = search_engine(qdrant, "same", text, model, k=15)
        assert ids(found) == ids(exact)
        assert [hit.passage for hit in found.hits] == [hit.passage for hit in exact.hits]
        assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in exact.hits], rel=1e-5)
        for theirs, ours in zip(found.hits, exact.hits, strict=True):
            assert [term.term for term in theirs.matched] == [term.term for term in ours.matched]
            for mine, other in zip(ours.matched, theirs.matched, strict=True):
                assert other.contribution == pytest.approx(mine.contribution, rel=1e-5)


def test_half_precision_and_disk_are_asked_for(model, corpus, tmp_path):
    # The local mode computes in float32 all the same: without a server only the request can be seen.
    engine = QdrantEngine.connect(":memory:")
    load_index(model, [corpus], "half", engine, settings=["half=true", "on_disk=true"])
    parameters = engine.client.get_collection("half").config.params.sparse_vectors["tokens"]
    assert (parameters.index.datatype.value, parameters.index.on_disk) == ("float16", True)
    engine.close()


def test_a_folder_keeps_its_collections(model, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"id": "문서", "text": "쌀 소주"}) + "\n", encoding="utf-8")
    first = connect("qdrant", str(tmp_path / "store"))
    load_index(model, [str(corpus)], "kept", first)
    first.close()
    second = connect("qdrant", str(tmp_path / "store"))
    assert ids(search_engine(second, "kept", "soju 소주", model)) == ["문서"]
    with pytest.raises(UserError, match="exists already"):
        load_index(model, [str(corpus)], "kept", second)
    load_index(model, [str(corpus)], "kept", second, overwrite=True)
    assert second.client.count("kept").count == 1
    second.close()


def test_a_users_mistakes_are_told(qdrant, model, corpus, tmp_path):
    with pytest.raises(UserError, match="no such collection"):
        search_engine(qdrant, "nowhere", "쌀", model)
    with pytest.raises(UserError, match="needs --url"):
        connect("qdrant", None)
    with pytest.raises(UserError, match="unknown setting"):
        load_index(model, [corpus], "x", qdrant, settings=["kind=rank_features"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        connect("qdrant", str(tmp_path / "file"))
    nowhere = QdrantEngine.connect("http://127.0.0.1:9", timeout=1)
    with pytest.raises(UserError, match="look whether the server runs"):
        load_index(model, [corpus], "x", nowhere)
    nowhere.close()
    load_index(model, [corpus], "made", qdrant)
    with pytest.raises(UserError, match="another model"):
        search_engine(qdrant, "made", "쌀", "ko-en-static")


def test_a_neural_model_keeps_its_weights(tmp_path, qdrant):
    from fixtures.pico_masked_lms import NEEDED, OTHERS, word_piece
    from soju.sparse.splade import SpladeEncoder

    lm, tokenizer = word_piece()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    SpladeEncoder(tmp_path / "lm", max_seq_length=16, device="cpu").save(str(tmp_path / "model"))
    corpus = tmp_path / "c.jsonl"
    rows = [{"id": str(number), "text": text} for number, text in enumerate(NEEDED + OTHERS)]
    corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    model = str(tmp_path / "model")
    loaded = load_index(model, [str(corpus)], "neural", qdrant)
    assert loaded.facts.weighting == "as_is"
    queries = [NEEDED[0], OTHERS[3], "machine 검색"]
    for text, exact in zip(queries, exact_search(model, str(corpus), tmp_path / "index", queries, k=10), strict=True):
        found = search_engine(qdrant, "neural", text, model, k=10)
        assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in exact.hits], rel=1e-5)
        assert set(ids(found)) == set(ids(exact))
