from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import IntegrityError, UserError
from soju.core.files import MANIFEST, verify_manifest
from soju.data.rows import Document
from soju.search.chunking import ChunkSettings
from soju.search.folder import IndexSettings, WeightingSettings
from soju.search.index import SparseIndex

TERMS = ["소주", "soju", "rice", "쌀", "물", "still", "열", "heat"]
BM25 = IndexSettings(weighting=WeightingSettings(kind="bm25"), batch_size=3)


def encode(texts):
    counts = [[text.split().count(term) for term in TERMS] for text in texts]
    return csr_array(np.array(counts, dtype=np.float32).reshape(len(texts), len(TERMS)))


def random_documents(count, *, seed=0, first=0):
    rng = np.random.default_rng(seed)
    return [Document(f"문서-{first + i}", " ".join(rng.choice(TERMS, int(rng.integers(1, 9))))) for i in range(count)]


def summary(results):
    return [[(hit.document_id, round(hit.score, 5), hit.passage) for hit in hits] for hits in results]


QUERIES = encode(["소주 soju", "rice 쌀 쌀 물", "열", "nothing here"])


def test_a_hit_tells_what_matched_and_why(tmp_path):
    documents = [Document("가", "소주 소주 물"), Document("b", "soju rice"), Document("c", "heat")]
    index = SparseIndex.build(tmp_path / "index", documents, encode, TERMS, BM25)
    (hits,) = index.search(encode(["소주 물 soju"]), 10)
    assert [hit.document_id for hit in hits] == ["가", "b"]
    assert (hits[0].passage, hits[0].start, hits[0].end) == ("소주 소주 물", 0, 7)
    assert [(match.term, match.language) for match in hits[0].matched] == [("소주", "ko"), ("물", "ko")]
    first = hits[0].matched[0]
    # Lengths 3, 2, 1: average 2. tf 2: 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 1.5)); one of three documents holds it.
    assert first.document_weight == pytest.approx(4.4 / (2 + 1.2 * 1.375))
    assert first.query_weight == pytest.approx(np.log(1 + 2.5 / 1.5))
    assert index.search(encode(["소주"]), explain_hits=False)[0][0].matched == ()


@pytest.mark.parametrize("engine", ["exact", "block-max"])
def test_contributions_sum_to_the_score(tmp_path, engine):
    settings = BM25.model_copy(update={"engine": engine})
    index = SparseIndex.build(tmp_path / "index", random_documents(80), encode, TERMS, settings)
    for hits in index.search(QUERIES, 20, engine=engine):
        for hit in hits:
            assert sum(match.contribution for match in hit.matched) == pytest.approx(hit.score, rel=1e-5)


def test_search_equals_the_dense_product_of_given_weights(tmp_path):
    documents = random_documents(60)
    index = SparseIndex.build(tmp_path / "index", documents, encode, TERMS)
    scores = (encode([document.text for document in documents]) @ QUERIES.T).toarray()
    for query, hits in enumerate(index.search(QUERIES, 100)):
        order = [i for i in np.argsort(-scores[:, query], kind="stable") if scores[i, query] > 0]
        assert [(hit.document_id, hit.score) for hit in hits] == [
            (documents[i].id, pytest.approx(scores[i, query])) for i in order
        ]
    assert index.search(QUERIES, 3)[3] == []
    with pytest.raises(UserError, match="at least one document"):
        index.search(QUERIES, 0)


@pytest.mark.parametrize(("share", "segments"), [(100.0, 4), (0.25, 1)])
def test_adding_equals_a_fresh_build_with_the_same_average_length(tmp_path, share, segments):
    settings = BM25.model_copy(update={"compact_share": share})
    documents = random_documents(90, seed=4)
    grown = SparseIndex.build(tmp_path / "grown", documents[:30], encode, TERMS, settings)
    for start in (30, 50, 70):
        assert grown.add(documents[start : start + 20], encode) == 20
    assert len(grown.segments) == segments
    weighting = WeightingSettings(kind="bm25", average_length=grown.description.average_length)
    fresh = SparseIndex.build(
        tmp_path / "fresh", documents, encode, TERMS, settings.model_copy(update={"weighting": weighting})
    )
    expected = summary(fresh.search(QUERIES, 25))
    assert summary(grown.search(QUERIES, 25)) == expected
    assert summary(SparseIndex.open(tmp_path / "grown", full_check=True).search(QUERIES, 25)) == expected
    verify_manifest(tmp_path / "grown")
    assert len(list((tmp_path / "grown" / "segments").iterdir())) == segments


def test_many_small_additions_are_merged_beside_the_first_segment(tmp_path):
    settings = BM25.model_copy(update={"compact_share": 100.0, "max_added_segments": 2})
    index = SparseIndex.build(tmp_path / "index", random_documents(10), encode, TERMS, settings)
    for i in range(4):
        index.add(random_documents(3, seed=i, first=100 + 3 * i), encode)
        assert len(index.segments) <= 3
    assert index.documents == 22


SEISMIC_INDEX = Path(__file__).parents[1] / "fixtures" / "index_with_seismic.zip"
"""Three documents, indexed with ``engine: seismic`` when there was one."""


def test_an_index_built_with_the_former_engine_seismic_is_searched_and_grows(tmp_path):
    with zipfile.ZipFile(SEISMIC_INDEX) as archive:
        archive.extractall(tmp_path / "index")
    index = SparseIndex.open(tmp_path / "index", fingerprint="m", full_check=True)
    assert (index.description.settings.engine, index.segments[0].entry.fast) == ("auto", None)
    query = csr_array(np.float32([[1.0, 0.8, 0.0, 0.5]]))  # 소주, soju, rice
    (hits,) = index.search(query)
    # Every document counts two known terms: tf 1 gives 1, tf 2 gives 2 * 2.2 / (2 + 1.2). Two of three hold rice.
    rare, common = np.log(1 + 2.5 / 1.5), np.log(1 + 1.5 / 2.5)
    assert {hit.document_id: hit.score for hit in hits} == {
        "가": pytest.approx(rare),
        "b": pytest.approx(0.8 * rare + 0.5 * common),
        "c": pytest.approx(0.5 * common * 4.4 / 3.2),
    }
    index.add([Document("d", "rice")], lambda texts: csr_array(np.float32([[0.0, 0.0, 0.0, 1.0]])))
    assert {path.name for path in index.segments[0].folder.iterdir()}.isdisjoint({"engine.index.seismic"})
    assert "seismic" not in (tmp_path / "index" / "index.json").read_text(encoding="utf-8")
    (hits,) = SparseIndex.open(tmp_path / "index", full_check=True).search(query)
    assert {hit.document_id for hit in hits} == {"가", "b", "c", "d"}


def test_block_max_is_built_from_the_given_size_on_and_engines_that_are_not_there_are_refused(tmp_path):
    settings = IndexSettings(block_max_from_chunks=10)
    small = SparseIndex.build(tmp_path / "small", random_documents(9), encode, TERMS, settings)
    large = SparseIndex.build(tmp_path / "large", random_documents(10), encode, TERMS, settings)
    assert [index.segments[0].entry.fast for index in (small, large)] == [None, "block-max"]
    with pytest.raises(UserError, match="has no block-max engine"):
        small.search(QUERIES, engine="block-max")


def test_the_default_engine_finds_what_the_exact_one_finds_also_after_additions_and_many_results(tmp_path):
    index = SparseIndex.build(
        tmp_path / "index", random_documents(300), encode, TERMS, IndexSettings(block_max_from_chunks=1)
    )
    index.add(random_documents(40, seed=3, first=1000), encode)
    assert [segment.entry.fast for segment in index.segments] == ["block-max", None]
    for k in (3, 100, 300):
        assert index.search(QUERIES, k) == index.search(QUERIES, k, engine="exact")
    large = index.segments[0]
    assert [large.searcher(k, "auto") is large.fast for k in (100, 101)] == [True, False]
    assert large.searcher(101, "block-max") is large.fast


def test_a_merge_builds_block_max_again_and_its_files_are_checked(tmp_path):
    index = SparseIndex.build(
        tmp_path / "index", random_documents(40), encode, TERMS, IndexSettings(engine="block-max", compact_share=0.1)
    )
    index.add(random_documents(40, seed=3, first=1000), encode)
    assert [segment.entry.fast for segment in index.segments] == ["block-max"]
    assert index.search(QUERIES, 5) == index.search(QUERIES, 5, engine="exact")
    rows = index.segments[0].folder / "block-max" / "rows.npy"
    damaged = bytearray(rows.read_bytes())
    damaged[-1] ^= 1
    rows.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"rows\.npy"):
        SparseIndex.open(tmp_path / "index", full_check=True)


def test_a_long_document_is_found_once_by_its_best_chunk(tmp_path):
    text = "rice 물. " * 30 + "소주 소주 소주. " + "still heat. " * 30
    documents = [Document("long", text), Document("short", "소주")]
    settings = IndexSettings(chunking=ChunkSettings(words=10, overlap_sentences=0))
    index = SparseIndex.build(
        tmp_path / "index", documents, lambda texts: encode([t.replace(".", "") for t in texts]), TERMS, settings
    )
    assert index.chunks > 10
    hits = index.search(encode(["소주 rice 열 heat"]), 2)[0]
    assert [hit.document_id for hit in hits] == ["long", "short"]
    assert "소주 소주 소주" in hits[0].passage
    assert text[hits[0].start : hits[0].end] == hits[0].passage


def test_documents_without_terms_are_kept_counted_and_named(tmp_path):
    documents = [Document("a", "소주"), Document("빈", "없는 말"), Document("c", "")]
    index = SparseIndex.build(tmp_path / "index", documents, encode, TERMS, BM25)
    assert index.documents == 3
    assert index.empty_documents == (2, ("빈", "c"))
    stored = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))
    assert stored["segments"][0]["first_empty_documents"] == ["빈", "c"]


def test_a_prior_ranks_a_tiny_index(tmp_path):
    share = np.full(len(TERMS), 0.001, dtype=np.float32)
    share[TERMS.index("물")] = 0.5
    settings = IndexSettings(weighting=WeightingSettings(kind="bm25", prior_documents=1000))
    documents = [Document("common", "물 쌀"), Document("rare", "소주 쌀"), Document("x", "쌀 열")]
    index = SparseIndex.build(tmp_path / "index", documents, encode, TERMS, settings, prior_share_V=share)
    assert [hit.document_id for hit in index.search(encode(["물 소주"]))[0]] == ["rare", "common"]
    assert summary(SparseIndex.open(tmp_path / "index").search(QUERIES)) == summary(index.search(QUERIES))


def test_a_repeated_id_is_refused_with_its_place_and_nothing_is_left(tmp_path):
    documents = [Document("가", "소주"), Document("b", "물"), Document("가", "쌀")]
    with pytest.raises(UserError, match=r'document 3: id "가" is in the index already \(document 1 has it\)'):
        SparseIndex.build(tmp_path / "index", documents, encode, TERMS)
    assert list(tmp_path.iterdir()) == []
    index = SparseIndex.build(tmp_path / "index", documents[:2], encode, TERMS)
    with pytest.raises(UserError, match='document 1: id "b" is in the index already'):
        index.add([Document("b", "")], encode)
    assert SparseIndex.open(tmp_path / "index", full_check=True).documents == 2


@pytest.mark.parametrize(
    ("documents", "message"), [([], "no documents to index"), ([Document("", "물")], "document 1: the id is empty")]
)
def test_nothing_to_index_is_refused(tmp_path, documents, message):
    with pytest.raises(UserError, match=message):
        SparseIndex.build(tmp_path / "index", documents, encode, TERMS)


def test_an_occupied_folder_is_refused_and_only_an_index_is_replaced(tmp_path):
    SparseIndex.build(tmp_path / "index", random_documents(2), encode, TERMS)
    with pytest.raises(UserError, match="holds an index already"):
        SparseIndex.build(tmp_path / "index", random_documents(3), encode, TERMS)
    replaced = SparseIndex.build(tmp_path / "index", random_documents(3), encode, TERMS, overwrite=True)
    assert replaced.documents == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="not an index"):
        SparseIndex.build(tmp_path / "other", random_documents(3), encode, TERMS, overwrite=True)


@pytest.mark.parametrize("name", ["terms.json", "segments/0000/documents.utf8", "segments/0000/postings/impacts.npy"])
def test_a_damaged_file_is_refused(tmp_path, name):
    SparseIndex.build(tmp_path / "index", random_documents(9), encode, TERMS)
    path = tmp_path / "index" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="its content changed"):
        SparseIndex.open(tmp_path / "index", full_check=True)
    path.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="bytes instead of"):
        SparseIndex.open(tmp_path / "index")
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        SparseIndex.open(tmp_path / "index")


def test_an_interrupted_change_is_finished_or_dropped(tmp_path):
    folder = tmp_path / "index"
    index = SparseIndex.build(folder, random_documents(9), encode, TERMS, BM25)
    before, manifest = (folder / "index.json").read_bytes(), (folder / MANIFEST).read_bytes()
    (folder / "index.next.json").write_text("half")
    assert SparseIndex.open(folder).documents == 9
    index.add(random_documents(1, first=50), encode)
    after = (folder / "index.json").read_bytes()
    # Stopped between the manifest and the rename: the change counts.
    (folder / "index.next.json").write_bytes(after)
    (folder / "index.json").write_bytes(before)
    assert SparseIndex.open(folder).documents == 10
    # Stopped before the manifest: it does not.
    (folder / "index.next.json").write_bytes(after)
    (folder / "index.json").write_bytes(before)
    (folder / MANIFEST).write_bytes(manifest)
    assert SparseIndex.open(folder).documents == 9


def test_an_index_of_another_model_or_format_is_refused(tmp_path):
    folder = tmp_path / "index"
    SparseIndex.build(folder, random_documents(2), encode, TERMS, fingerprint="model-a")
    SparseIndex.open(folder, fingerprint="model-a")
    with pytest.raises(UserError, match='built with model "model-a", not "model-b"'):
        SparseIndex.open(folder, fingerprint="model-b")
    with pytest.raises(UserError, match="no such index"):
        SparseIndex.open(tmp_path / "absent")
    path = folder / "index.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format": 2', '"format": 9'), encoding="utf-8")
    with pytest.raises(UserError, match="not of format 2"):
        SparseIndex.open(folder)


def test_a_change_by_another_process_is_not_overwritten(tmp_path):
    first = SparseIndex.build(tmp_path / "index", random_documents(9), encode, TERMS)
    SparseIndex.open(tmp_path / "index").add(random_documents(1, first=50), encode)
    with pytest.raises(UserError, match="another process changed"):
        first.add(random_documents(1, first=60), encode)
    assert SparseIndex.open(tmp_path / "index", full_check=True).documents == 10


def test_any_text_comes_back_as_it_was(tmp_path):
    texts = ["소주 \ud800 물", "물\x00쌀 \r\n 물", "물 🍶 ㅎㅏㄴ\u1112\u1161\u11ab"]
    documents = [Document(f"문서\udfff{i}", text) for i, text in enumerate(texts)]
    index = SparseIndex.build(tmp_path / "index", documents, encode, TERMS)
    hits = index.search(encode(["물"]))[0]
    assert [(hit.document_id, hit.passage) for hit in sorted(hits, key=lambda hit: hit.document_id)] == [
        (document.id, document.text) for document in documents
    ]


def test_rank_names_the_documents_that_search_finds(tmp_path):
    documents = [Document(str(number), text) for number, text in enumerate(["a b", "b c", "c c a", "d"])]
    vectors = {"a": 0, "b": 1, "c": 2, "d": 3}

    def encode(texts):
        return csr_array([[text.split().count(name) for name in vectors] for text in texts], dtype=np.float32)

    settings = IndexSettings(weighting=WeightingSettings(kind="bm25"))
    index = SparseIndex.build(tmp_path / "index", documents, encode, list(vectors), settings)
    queries = encode(["a c", "d", "b b a"])
    found = index.search(queries, 3)
    assert index.rank(queries, 3) == [[hit.document_id for hit in hits] for hits in found]
