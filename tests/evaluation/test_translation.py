"""BLEU, chrF++, TER and ROUGE against sacrebleu and rouge-score on our own Korean and English passages."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER

from soju.core.errors import ConfigError, IntegrityError, UserError
from soju.evaluation.translation import (
    COUNTS,
    QualityWeights,
    SentenceStatistics,
    Tokens,
    english_tokens,
    korean_tokens,
    longest_common_subsequence,
    measure,
)

SAMPLES = Path(__file__).parents[2] / "src" / "soju" / "samples"
WORDS = Tokens("words", str.split)
BLEU_ONLY = QualityWeights(chrf=0, bleu=1, ter=0, rouge_l=0)


def passages(language, count=24):
    lines = (SAMPLES / "passages.heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)[language] for line in lines]


def corrupted(texts, *, rate, seed):
    """Drop, swap and replace words, and leave some hypotheses empty, short or equal to the reference."""
    generator = random.Random(seed)
    vocabulary = [word for text in texts for word in text.split()]
    results = []
    for number, text in enumerate(texts):
        words = [generator.choice(vocabulary) if generator.random() < rate else word for word in text.split()]
        if number % 5 == 1:
            cut = generator.randrange(len(words))
            words = words[cut:] + words[:cut]  # a shift: what TER counts as one edit
        results.append({3: "", 4: words[0], 6: text, 8: " "}.get(number, " ".join(words)))
    return results


def tokens_of(language):
    return english_tokens() if language == "en" else korean_tokens("kiwi")


class LowerTokens:
    """The tokens of ours in the shape that rouge-score takes."""

    def __init__(self, tokens):
        self.tokens = tokens

    def tokenize(self, text):
        return [token.lower() for token in self.tokens.split(text)]


@pytest.fixture(scope="module", params=["en", "ko"])
def case(request):
    references = passages(request.param)
    hypotheses = corrupted(references, rate=0.3, seed=7)
    tokens = tokens_of(request.param)
    return request.param, hypotheses, references, tokens, measure(hypotheses, references, tokens)


def test_bleu_is_that_of_sacrebleu(case):
    language, hypotheses, references, tokens, measured = case
    if language == "en":
        theirs = BLEU(tokenize="13a").corpus_score(hypotheses, [references])
    else:
        ours, reference = ([" ".join(tokens.split(text)) for text in texts] for texts in (hypotheses, references))
        theirs = BLEU(tokenize="none", force=True).corpus_score(ours, [reference])
    assert 0.2 < measured.scores()["bleu"] < 0.9
    assert measured.scores()["bleu"] == pytest.approx(theirs.score / 100, abs=1e-12)


def test_chrf_is_that_of_sacrebleu(case):
    _, hypotheses, references, _, measured = case
    theirs = CHRF(word_order=2).corpus_score(hypotheses, [references])
    assert measured.scores()["chrf++"] == pytest.approx(theirs.score / 100, abs=1e-12)


def test_ter_is_that_of_sacrebleu_on_our_tokens(case):
    _, hypotheses, references, tokens, measured = case
    ours, reference = ([" ".join(tokens.split(text)) for text in texts] for texts in (hypotheses, references))
    theirs = TER().corpus_score(ours, [reference])
    assert measured.scores()["1-ter"] == pytest.approx(1 - theirs.score / 100, abs=1e-12)


def test_rouge_is_that_of_rouge_score_with_the_same_tokens(case):
    _, hypotheses, references, tokens, measured = case
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=LowerTokens(tokens))
    theirs = [scorer.score(*pair) for pair in zip(references, hypotheses, strict=True)]
    for ours, name in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        mean = np.mean([score[name].fmeasure for score in theirs])
        assert measured.scores()[ours] == pytest.approx(mean, abs=1e-12)


def test_ko_mecab_gives_the_published_bleu_of_sacrebleu():
    pytest.importorskip("mecab_ko")
    references = passages("ko")
    hypotheses = corrupted(references, rate=0.3, seed=7)
    measured = measure(hypotheses, references, korean_tokens("ko-mecab"))
    theirs = BLEU(trg_lang="ko").corpus_score(hypotheses, [references])
    assert measured.scores()["bleu"] == pytest.approx(theirs.score / 100, abs=1e-12)
    assert "ko-mecab" in measured.signature


def test_every_sentence_alone_scores_as_in_sacrebleu(case):
    language, hypotheses, references, tokens, measured = case
    bleu, chrf = BLEU(tokenize="13a" if language == "en" else "none", force=True), CHRF(word_order=2)
    for index, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        scores = measured.subset([index]).scores()
        pair = [(" ".join(tokens.split(text)) if language == "ko" else text) for text in (hypothesis, reference)]
        assert scores["bleu"] == pytest.approx(bleu.corpus_score([pair[0]], [[pair[1]]]).score / 100, abs=1e-12)
        assert scores["chrf++"] == pytest.approx(chrf.corpus_score([hypothesis], [[reference]]).score / 100, abs=1e-12)


texts = st.lists(st.sampled_from(["a", "b", "c", "가", "나", "!", "(a)"]), max_size=7).map(" ".join)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_scores_equal_sacrebleu_on_any_short_texts(pairs):
    hypotheses, references = [list(side) for side in zip(*pairs, strict=True)]
    scores = measure(hypotheses, references, WORDS).scores()
    bleu = BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score
    ter = TER().corpus_score(hypotheses, [references]).score
    assert scores["bleu"] == pytest.approx(bleu / 100, abs=1e-12)
    assert scores["chrf++"] == pytest.approx(CHRF(word_order=2).corpus_score(hypotheses, [references]).score / 100)
    assert scores["1-ter"] == pytest.approx(max(0, 1 - ter / 100), abs=1e-12)
    assert 0 <= scores["quality"] <= 1


def test_the_hand_worked_sentence():
    scores = measure(["the cat sat down"], ["the cat sat on the mat"], WORDS).scores()
    # three of four tokens, two of three bigrams, one of two trigrams, no 4-gram (counts one half); four against six
    assert scores["bleu"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25 * np.exp(1 - 6 / 4))
    assert scores["1-ter"] == pytest.approx(1 - 3 / 6)  # "down" -> "on", and "the mat" is missing
    assert scores["rouge-1"] == pytest.approx(2 * 3 / (4 + 6))
    assert scores["rouge-2"] == pytest.approx(2 * 2 / (3 + 5))
    assert scores["rouge-l"] == pytest.approx(2 * 3 / (4 + 6))
    assert scores["length-ratio"] == pytest.approx(13 / 17)


def test_quality_is_the_weighted_mean_of_fractions():
    weights = QualityWeights(chrf=0.5, bleu=0.25, ter=0.25, rouge_l=0)
    scores = measure(["a b c d e"], ["a b c d f"], WORDS).scores(weights)
    assert scores["quality"] == pytest.approx(0.5 * scores["chrf++"] + 0.25 * scores["bleu"] + 0.25 * scores["1-ter"])
    assert weights.signature == "1-ter=0.25,bleu=0.25,chrf++=0.5"


def test_a_perfect_translation_has_quality_1_and_an_empty_one_0():
    references = ["나는 학교에 갔다 .", "a b c d"]
    assert measure(references, references, WORDS).scores()["quality"] == pytest.approx(1)
    assert measure(["", ""], references, WORDS).scores()["quality"] == 0


def test_more_edits_than_words_are_worth_nothing_and_no_less():
    assert measure(["a b c d e f g h"], ["x"], WORDS).scores()["1-ter"] == 0


def test_given_metrics_are_means_and_take_part_in_the_quality():
    weights = QualityWeights(chrf=0, bleu=0, ter=0, rouge_l=0.5, bertscore=0.5)
    measured = measure(["a", "b"], ["a", "c"], WORDS, given={"bertscore": [1.0, 0.5]})
    assert measured.scores(weights)["bertscore"] == 0.75
    assert measured.scores(weights)["quality"] == pytest.approx(0.5 * 0.5 + 0.5 * 0.75)


def test_a_weighted_metric_that_was_not_measured_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"bertscore has weight 0\.2 and was not measured"):
        measure(["a"], ["a"], WORDS).scores(QualityWeights(chrf=0.2, bertscore=0.2))


def test_weights_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        QualityWeights(chrf=0.5)


@pytest.mark.parametrize("bad", [[1.5], [float("nan")], [0.5, 0.5]])
def test_given_scores_that_are_no_fractions_are_refused(bad):
    with pytest.raises(UserError, match="bertscore: 1 fractions between 0 and 1"):
        measure(["a"], ["a"], WORDS, given={"bertscore": bad})


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(UserError, match="2 hypotheses for 1 references"):
        measure(["a", "b"], ["a"], WORDS)


def test_no_sentence_is_refused():
    with pytest.raises(UserError, match="no sentence"):
        measure([], [], WORDS).scores()


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_bit_parallel_subsequence_is_that_of_the_table(ours, theirs):
    table = np.zeros((len(ours) + 1, len(theirs) + 1), dtype=int)
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert longest_common_subsequence(ours, theirs) == table[-1, -1]


def test_a_subset_scores_as_its_sentences_alone(case):
    _, hypotheses, references, tokens, measured = case
    chosen = [0, 3, 7, 11]
    alone = measure([hypotheses[i] for i in chosen], [references[i] for i in chosen], tokens)
    assert measured.subset(chosen).scores() == pytest.approx(alone.scores())
    assert measured.subset(np.isin(np.arange(len(measured)), chosen)).scores() == pytest.approx(alone.scores())


def test_the_quality_of_a_sentence_is_that_of_a_corpus_of_one(case):
    measured = case[-1]
    alone = [measured.subset([index]).scores()["quality"] for index in range(len(measured))]
    np.testing.assert_allclose(measured.sentence_quality(), alone)
    assert alone[6] == pytest.approx(1)  # the hypothesis that is the reference


def test_statistics_survive_a_file_bit_for_bit(tmp_path):
    measured = measure(["a b", "가"], ["a c", "가"], WORDS, given={"comet": [0.25, 1.0]})
    for name in ("one.npz", "two.npz"):
        measured.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = SentenceStatistics.load(tmp_path / "one.npz")
    np.testing.assert_array_equal(loaded.counts_NK, measured.counts_NK)
    np.testing.assert_array_equal(loaded.given["comet"], measured.given["comet"])
    assert (loaded.signature, loaded.scores()) == (measured.signature, measured.scores())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def write(path, **arrays):
    good = {
        "format": np.array("soju-translation-statistics-1"),
        "signature": np.array("s"),
        "counts": np.zeros((1, len(COUNTS)), dtype=np.int32),
    }
    with path.open("wb") as file:
        np.savez(file, **(good | arrays))
    return path


def test_a_file_made_by_hand_in_the_right_form_is_read(tmp_path):
    assert len(SentenceStatistics.load(write(tmp_path / "a.npz"))) == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"format": np.array("other")},
        {"counts": np.zeros((1, 3), dtype=np.int32)},
        {"counts": np.zeros((1, len(COUNTS)))},
        {"counts": -np.ones((1, len(COUNTS)), dtype=np.int32)},
        {"counts": np.array([{"a": 1}], dtype=object)},
        {"given_comet": np.array([2.0])},
        {"given_comet": np.array([0.5, 0.5])},
    ],
    ids=["format", "shape", "dtype", "negative", "pickle", "range", "length"],
)
def test_anything_else_in_the_file_is_refused(tmp_path, arrays):
    with pytest.raises(IntegrityError, match="no translation statistics"):
        SentenceStatistics.load(write(tmp_path / "a.npz", **arrays))


def test_a_broken_file_a_link_and_a_bomb_are_refused(tmp_path, monkeypatch):
    good = write(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "link.npz").symlink_to(good)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    for name in ("cut.npz", "link.npz", "other.npz", "absent.npz"):
        with pytest.raises(IntegrityError, match=name):
            SentenceStatistics.load(tmp_path / name)
    monkeypatch.setattr("soju.evaluation.translation._MOST_BYTES", 100)
    with pytest.raises(IntegrityError, match="more than 100 bytes"):
        SentenceStatistics.load(good)


def test_importing_translation_scores_loads_no_torch():
    code = (
        "import sys, soju.evaluation.translation_bootstrap; print('torch' in sys.modules, 'kiwipiepy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
