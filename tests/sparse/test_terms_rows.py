"""Term mappings and pairs become rows: the published rules by hand, on a vocabulary of nine words.

1 is the unknown word; [CLS] 2 and [SEP] 3 stand around every text.
"""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fixtures.pico_terms import SCRATCH, config_of
from fixtures.small_bilingual import train_small
from soju.data.rows import PairRow, Term, TermRow
from soju.sparse.export.stock import stock_tokenizer
from soju.sparse.initial import lexicon_vocabulary, plain_vocabulary
from soju.sparse.terms.training import NO_TEACHER_TEXT, TermsCollator, training_rows
from soju.teachers.dense import Embeddings

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["물", "바다", "깊은", "water", "sea", "deep", "ocean", "machine", "learning"]
ID = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}


@pytest.fixture(scope="module")
def vocabulary():
    backend = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return plain_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


def term_row(ko, *terms):
    return TermRow(ko, tuple(Term(*term) for term in terms))


def rows_of(vocabulary, terms, *overrides, pairs=(), banned=()):
    quiet = ("data.pairs_as_rows=false", "data.both_directions=false")
    return training_rows(terms, pairs, vocabulary, config_of(SCRATCH, *quiet, *overrides), banned=banned)


def test_terms_with_hangul_are_korean_targets_and_all_others_english_ones_lower_cased(vocabulary):
    row = term_row("바다", ("SEA", 0.9), ("깊은 물", 0.5), ("Ocean", 0.8), ("42 deep", 0.4))
    (example,), *_ = rows_of(vocabulary, [row]).targets
    assert example.source == [ID["바다"]]
    assert example.korean == [(ID["깊은"], 0.5), (ID["물"], 0.5)]
    assert example.english == [(ID["sea"], 0.9), (ID["ocean"], 0.8), (ID["deep"], 0.4)]  # 42 is unknown


def test_an_id_that_several_terms_reach_has_the_largest_similarity_of_them(vocabulary):
    row = term_row("바다", ("deep sea", 0.3), ("sea", 0.9), ("sea water", 0.6))
    rows = rows_of(vocabulary, [row])
    english = TermsCollator(rows, None, pad_id=0)([{"row": 0}])["label"]["targets"].english
    found = dict(zip(english.ids_T.tolist(), english.similarities_T.tolist(), strict=True))
    assert found == pytest.approx({ID["deep"]: 0.3, ID["sea"]: 0.9, ID["water"]: 0.6})
    assert rows.counts.english_targets == 3


def test_special_and_unknown_tokens_never_count(vocabulary):
    assert vocabulary.terms(["물 모름 물 [SEP]", "모름", ""]) == [[ID["물"]], [], []]
    assert vocabulary.terms([]) == []


def test_rows_without_a_usable_source_or_target_are_rejected_and_counted(vocabulary):
    rows = rows_of(
        vocabulary,
        [
            term_row("모름", ("sea", 1.0)),
            term_row("바다", ("unheard", 1.0), ("안들림", 1.0)),
            term_row("물", ("water", 1.0)),
            term_row("깊은", ("바다", 1.0)),
        ],
    )
    assert len(rows) == 2
    counts = rows.counts
    assert (counts.kept, counts.texts, counts.without_source, counts.without_target) == (2, 2, 1, 1)
    assert (counts.with_english, counts.english_targets, counts.korean_targets) == (1, 1, 1)


@pytest.mark.parametrize("spelled", ["물 바다", "물바다", "물-바다"])
def test_probe_words_are_never_trained_on_however_they_are_spaced(vocabulary, spelled):
    rows = rows_of(vocabulary, [term_row("물 바다", ("sea", 1.0)), term_row("물", ("water", 1.0))], banned=[spelled])
    assert [row[0].source for row in rows.targets] == [[ID["물"]]]
    assert rows.counts.banned == 1


ROW = term_row("바다", ("sea", 1.0), ("깊은 물", 0.5), ("Ocean", 0.8))


def test_the_teacher_reads_the_source_unless_told_to_read_the_translation(vocabulary):
    teacher = "teacher={model: a/b}"
    assert rows_of(vocabulary, [ROW], teacher).teacher_texts == ["바다"]
    translated = rows_of(vocabulary, [ROW, term_row("물", ("깊은", 1.0))], teacher, "teacher.text=translation")
    assert translated.teacher_texts == ["sea, Ocean"]
    assert translated.teacher == [[0], [NO_TEACHER_TEXT]]  # the second row has no translation


def test_a_text_that_several_rows_share_is_embedded_once(vocabulary):
    rows = rows_of(vocabulary, [ROW, term_row("물", ("water", 1.0)), ROW], "teacher={model: a/b}")
    assert rows.teacher_texts == ["바다", "물"]
    assert rows.teacher == [[0], [1], [0]]


def test_the_other_direction_teaches_the_best_translation_to_light_the_head_word(vocabulary):
    rows = rows_of(vocabulary, [ROW], "data.both_directions=true", "teacher={model: a/b}")
    (_, back), *_ = rows.targets
    assert (back.source, back.korean, back.english) == ([ID["sea"]], [(ID["바다"], 1.0)], [])
    assert rows.input_ids == [[[2, ID["바다"], 3], [2, ID["sea"], 3]]]
    assert rows.teacher_texts == ["바다", "sea"]
    assert rows.lengths == [6]


def test_pairs_light_up_each_other_and_rare_terms_most(vocabulary):
    texts = (("물 바다", "water sea"), ("깊은 물", "deep water"), ("물", "water"), ("물", "?"))
    pairs = [PairRow(korean, english) for korean, english in texts]
    settings = ("data.pairs_as_rows=true", "data.both_directions=true", "teacher={model: a/b, text: translation}")
    rows = rows_of(vocabulary, [], *settings, pairs=pairs)
    # share of a term = ln(1 + pairs / pairs with it) / ln(1 + pairs): 1 for a term of one pair alone
    common, in_all = math.log1p(4 / 3) / math.log1p(4), math.log1p(1) / math.log1p(4)
    korean, english = rows.targets[0]
    assert korean.source == [ID["물"], ID["바다"]]
    assert korean.english == [(ID["water"], pytest.approx(common)), (ID["sea"], pytest.approx(1.0))]
    assert english.korean == [(ID["물"], pytest.approx(in_all)), (ID["바다"], pytest.approx(1.0))]
    assert rows.counts.without_source == 1  # "?" is unknown
    assert rows.teacher[0] == [0, 0]  # both sides are taught by the English one


def test_the_collator_keeps_the_texts_of_a_row_together(vocabulary):
    rows = rows_of(vocabulary, [ROW, term_row("깊은 바다", ("deep sea", 1.0))], "data.both_directions=true")
    batch = TermsCollator(rows, None, pad_id=0)([{"row": 1}, {"row": 0}])
    deep = [2, ID["깊은"], ID["바다"], 3], [2, ID["deep"], ID["sea"], 3]
    sea = [2, ID["바다"], 3, 0], [2, ID["sea"], 3, 0]
    assert batch["text_input_ids"].tolist() == [*deep, *sea]
    assert batch["text_attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 1, 0], [1, 1, 1, 0]]
    targets = batch["label"]["targets"]
    assert (targets.rows, targets.source.rows_T.tolist()) == (4, [0, 0, 1, 1, 2, 3])
    assert batch["label"]["partner"].tolist() == [1, 0, 3, 2]  # each text's translation
    assert "teacher" not in batch["label"]


def test_a_text_whose_row_has_no_translation_has_no_partner(vocabulary):
    terms = [term_row("물", ("깊은", 1.0)), ROW]
    batch = TermsCollator(rows_of(vocabulary, terms, "data.both_directions=true"), None, pad_id=0)(
        [{"row": 0}, {"row": 1}]
    )
    assert batch["label"]["partner"].tolist() == [-1, 2, 1]


def test_the_collator_hands_out_the_teachers_vectors_of_the_texts_that_have_one(vocabulary):
    terms = [ROW, term_row("물", ("깊은", 1.0)), term_row("깊은", ("deep", 1.0))]
    rows = rows_of(vocabulary, terms, "teacher={model: a/b}", "teacher.text=translation")
    vectors = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    collate = TermsCollator(rows, Embeddings([vectors], [0, 0], [0, 1]), pad_id=0)
    label = collate([{"row": 2}, {"row": 1}, {"row": 0}])["label"]
    assert label["taught"].tolist() == [0, 2]
    assert torch.equal(label["teacher"], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    alone = collate([{"row": 1}])["label"]
    assert (len(alone["taught"]), tuple(alone["teacher"].shape)) == (0, (0, 2))


def test_long_texts_are_cut_as_the_student_reads_them(vocabulary):
    rows = rows_of(vocabulary, [term_row("물 바다 깊은 물 바다", ("sea", 1.0))], "student.max_length=4")
    assert rows.input_ids == [[[2, ID["물"], ID["바다"], 3]]]


def test_texts_with_a_term_are_counted_for_the_penalty(vocabulary):
    rows = rows_of(vocabulary, [ROW, term_row("깊은 바다", ("sea", 1.0))])
    counts_V = rows.texts_with_term(len(ID))
    assert {word: int(counts_V[ID[word]]) for word in ("바다", "깊은", "sea")} == {"바다": 2, "깊은": 1, "sea": 0}


def test_in_a_lexicon_inflected_pieces_count_for_their_word_and_particles_for_nothing():
    static = train_small()
    tokenizer = stock_tokenizer(static.tokenizer, max_length=16, start_token=True)
    inflected, plain = lexicon_vocabulary(tokenizer, static).terms(["백신을 찾는다", "백신"])
    assert set(plain) <= set(inflected)
    assert [static.terms[term] for term in plain] == ["백신"]
    assert 0 not in inflected
