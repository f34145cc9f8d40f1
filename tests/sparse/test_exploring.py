"""What the page is told: terms, hits and why, with the packaged model and a second one that translates nothing."""

import dataclasses
import threading

import pytest
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.results import MatchedTerm
from soju.data.rows import Document
from soju.sparse.explore import Explorer, open_models, passage_parts, words_of
from soju.sparse.indexing import Index
from soju.sparse.model import model_folder
from soju.sparse.static.encoder import StaticEncoder

HEART = "Two hearts: blood leaves by a vessel."
DOCUMENTS = [
    Document("heart", HEART),
    Document("net", "A network connects computers."),
    Document("심장", "심장은 혈관으로 피를 보낸다."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The packaged model, one like it without translations, and an index of each."""
    root = tmp_path_factory.mktemp("explore")
    packaged = model_folder("ko-en-static")
    encoder = StaticEncoder.load(packaged)
    nothing = csr_array(encoder.translations_VV.shape, dtype=encoder.translations_VV.dtype)
    dataclasses.replace(encoder, translations_VV=nothing).save(root / "plain")
    for name, model in (("index", packaged), ("plain-index", root / "plain")):
        Index.build(DOCUMENTS, model, root / name)
    return root


@pytest.fixture(scope="module")
def both(folders):
    indexes = [folders / "plain-index", folders / "index"]  # the other way round: each finds its model
    return Explorer(open_models("ko-en-static", against=str(folders / "plain"), indexes=indexes))


def match(term, contribution, language="en"):
    return MatchedTerm(term=term, language=language, query_weight=1.0, document_weight=contribution,
                       contribution=contribution)  # fmt: skip


def test_own_terms_are_told_from_added_ones(both):
    packaged, plain = both.expand("심장").models
    own = {term.term for term in packaged.terms if term.in_text}
    assert own == {"심장"} == {term.term for term in plain.terms}
    added = {term.term: term for term in packaged.terms if not term.in_text}
    assert added["heart"].language == "en"
    assert added["heart"].only_here
    assert not any(term.only_here for term in packaged.terms if term.in_text)
    assert not any(term.only_here for term in plain.terms)


def test_shares_of_languages_add_up_to_one_and_count_every_term(both):
    packaged, plain = both.expand("심장 network").models
    for model in (packaged, plain):
        assert sum(item.share for item in model.languages) == pytest.approx(1)
        assert sum(item.terms for item in model.languages) == model.active_terms == len(model.terms)
    assert [(item.language, item.terms, item.share) for item in plain.languages] == [("ko", 1, 0.5), ("en", 1, 0.5)]


def test_a_hit_says_why(both):
    packaged, plain = both.search("심장 혈관").models
    heart = next(hit for hit in packaged.hits if hit.document_id == "heart")
    assert heart.only_here
    assert [hit.document_id for hit in plain.hits] == ["심장"]
    assert not plain.hits[0].only_here
    assert sum(term.contribution for term in heart.matched) == pytest.approx(heart.score, rel=1e-5)
    for term in heart.matched:
        assert term.contribution == pytest.approx(term.query_weight * term.document_weight, rel=1e-5)
    assert not any(term.in_query for term in heart.matched)
    assert all(term.in_query for term in plain.hits[0].matched)
    assert "".join(part.text for part in heart.parts) == HEART
    assert {(part.text, part.term) for part in heart.parts} >= {("hearts", "heart"), ("vessel", "vessel")}


def test_one_model_has_nothing_to_differ_from(folders):
    explorer = Explorer(open_models("ko-en-static", indexes=[folders / "index"]))
    (expansion,), (search,) = explorer.expand("심장").models, explorer.search("심장").models
    assert not any(term.only_here for term in expansion.terms)
    assert search.hits
    assert not any(hit.only_here for hit in search.hits)


@pytest.mark.parametrize("text", ["?!", "ꙮ", "\0"])
def test_a_text_without_terms_lights_up_and_finds_nothing(both, text):
    assert [(model.active_terms, model.terms, model.languages) for model in both.expand(text).models] == [
        (0, (), ())
    ] * 2
    assert [model.hits for model in both.search(text).models] == [(), ()]


def test_several_questions_at_once_get_the_answers_they_get_alone(both):
    texts = ["심장", "network", "피", "컴퓨터"] * 4
    alone = [(both.expand(text), both.search(text)) for text in texts]
    together = [None] * len(texts)

    def ask(place):
        together[place] = (both.expand(texts[place]), both.search(texts[place]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_part_of_a_korean_word_is_marked_and_a_whole_english_one():
    terms_in = {"혈관이": {"혈관"}, "막혀": {"막다"}, "Vessels": {"vessel"}, "the": {"the"}}
    matched = [match("혈관", 3.0, "ko"), match("막다", 1.0, "ko"), match("vessel", 4.0)]
    parts = passage_parts("혈관이 막혀: Vessels, the", matched, terms_in)
    assert [(part.text, part.term, part.share) for part in parts] == [
        ("혈관", "혈관", 0.375),
        ("이 ", None, 0),
        ("막혀", "막다", 0.125),
        (": ", None, 0),
        ("Vessels", "vessel", 0.5),
        (", the", None, 0),
    ]


def test_words_are_runs_of_one_script():
    assert words_of("AI를 쓰는 <b>사람3명</b>") == ["AI", "를", "쓰는", "b", "사람", "3", "명", "b"]


def test_an_index_must_belong_to_one_of_the_models(folders):
    with pytest.raises(UserError, match=r"plain-index: was made with another model than ko-en-static; .*/model$"):
        open_models("ko-en-static", indexes=[folders / "plain-index"])
    with pytest.raises(UserError, match="a second index of the same model"):
        open_models("ko-en-static", indexes=[folders / "index"] * 2)
    with pytest.raises(UserError, match="nowhere"):
        open_models("ko-en-static", indexes=[folders / "nowhere"])
    with pytest.raises(UserError, match="not a model folder"):
        open_models("ko-en-static", against=str(folders / "nowhere"))


def test_labels_name_the_index_and_what_weights_mean(folders):
    with_index, without = open_models("ko-en-static", against=str(folders / "plain"), indexes=[folders / "index"])
    assert with_index.label.index == "3 documents, 3 passages"
    assert without.label.index == ""
    assert "idf" in with_index.label.note
