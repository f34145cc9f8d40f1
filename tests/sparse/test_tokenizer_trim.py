import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from soju.core.errors import UserError
from soju.sparse.trimmed_model import (
    choose_ids,
    count_ids,
    indispensable_ids,
    merge_parts,
    trim_tokenizer_json,
    unknown_word_pieces,
)

SENTENCES = ["banana bandana", "가나다 나다가", "abc bcd cda dab", "한국어 한국 국어", "aaaa bb abab", "x-ray 42"]


def trained(model, trainer, pre_tokenizer):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return json.loads(backend.to_str())


def specs():
    options = {"vocab_size": 120, "special_tokens": ["[UNK]"], "show_progress": False}
    unigram = {"vocab_size": 60, "special_tokens": ["[UNK]"], "unk_token": "[UNK]", "show_progress": False}
    return {
        "bpe": trained(models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**options), pre_tokenizers.Whitespace()),
        "bpe-##": trained(
            models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"),
            trainers.BpeTrainer(continuing_subword_prefix="##", **options),
            pre_tokenizers.Whitespace(),
        ),
        "bytes": trained(
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
            pre_tokenizers.ByteLevel(),
        ),
        "unigram": trained(models.Unigram(), trainers.UnigramTrainer(**unigram), pre_tokenizers.Metaspace()),
        "word-piece": trained(
            models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**options), pre_tokenizers.Whitespace()
        ),
        "words": trained(
            models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**options), pre_tokenizers.Whitespace()
        ),
    }


SPECS = specs()


def pieces(spec, text):
    return Tokenizer.from_str(json.dumps(spec)).encode(text, add_special_tokens=False).tokens


@given(
    kind=st.sampled_from(list(SPECS)),
    texts=st.lists(st.text("abcdnrxy가나다한국어 -é漢", max_size=12), min_size=1, max_size=4),
)
def test_a_corpus_has_the_same_pieces_after_trimming_to_what_it_needs(kind, texts):
    spec = SPECS[kind]
    kept = choose_ids(spec, count_ids(spec, texts), max_size=65_535)
    trimmed = trim_tokenizer_json(spec, kept)
    assert Tokenizer.from_str(json.dumps(trimmed)).get_vocab_size() == len(kept)
    for text in texts:
        assert pieces(trimmed, text) == pieces(spec, text)


@given(kind=st.sampled_from([kind for kind in SPECS if kind != "words"]), extra=st.integers(0, 40))
def test_however_few_are_kept_every_kept_bpe_piece_can_be_made(kind, extra):
    spec = SPECS[kind]
    counts = count_ids(spec, SENTENCES)
    smallest = len(choose_ids(spec, np.zeros_like(counts), max_size=65_535))
    kept = choose_ids(spec, counts, max_size=smallest + extra)
    assert smallest <= len(kept) <= smallest + extra
    trimmed = trim_tokenizer_json(spec, kept)
    known = set(Tokenizer.from_str(json.dumps(trimmed)).get_vocab())
    for piece, parts in merge_parts(spec).items():
        assert piece not in known or known.issuperset(parts)


def test_what_is_needed_most_is_kept_and_the_rest_spelt_out():
    spec = SPECS["word-piece"]
    counts = count_ids(spec, ["banana banana banana bandana"])
    smallest = len(choose_ids(spec, np.zeros_like(counts), max_size=999))
    trimmed = trim_tokenizer_json(spec, choose_ids(spec, counts, max_size=smallest + 1))
    assert pieces(trimmed, "banana") == ["banana"]
    assert pieces(trimmed, "bandana") == ["b", "##a", "##n", "##d", "##a", "##n", "##a"]


def test_counts_are_those_of_the_pieces():
    spec = SPECS["words"]
    counts = count_ids(spec, ["banana bandana banana", "새 banana"])
    vocabulary = spec["model"]["vocab"]
    assert {piece: counts[number] for piece, number in vocabulary.items() if counts[number]} == {
        "banana": 3,
        "bandana": 1,
        "[UNK]": 1,
    }


def test_a_word_that_word_piece_does_not_know_keeps_the_pieces_tried_on_it():
    """Of aby, ab is taken and ##y not found; without ab, a and then ##by would be, and the word no longer unknown."""
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "ab": 1, "a": 2, "##by": 3, "q": 4}}
    spec = SPECS["word-piece"] | {"model": model}
    assert unknown_word_pieces(spec, "aby") == ["ab"]
    assert unknown_word_pieces(spec, "ab") == []
    assert pieces(spec, "aby") == ["[UNK]"]
    kept = choose_ids(spec, count_ids(spec, ["aby"]), max_size=10)
    assert pieces(trim_tokenizer_json(spec, kept), "aby") == ["[UNK]"]


def test_a_unigram_model_keeps_its_least_likely_piece_which_prices_the_unknown():
    spec = SPECS["unigram"]
    scores = [score for _, score in spec["model"]["vocab"]]
    assert scores.index(min(scores)) in indispensable_ids(spec)


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="[A] $A [B]", special_tokens=[("[A]", 5), ("[B]", 7)]),
        processors.BertProcessing(("[B]", 7), ("[A]", 5)),
        processors.RobertaProcessing(("[B]", 7), ("[A]", 5)),
        processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("[B]", 7), ("[A]", 5))]),
    ],
    ids=["template", "bert", "roberta", "sequence"],
)
def test_ids_of_the_post_processor_and_of_padding_follow(processor):
    words = {f"w{number}": number for number in range(8)} | {"[A]": 5, "[B]": 7}
    backend = Tokenizer(models.WordLevel({word: number for word, number in words.items() if word not in ("w5", "w7")}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processor
    backend.enable_padding(pad_id=3, pad_token="w3", length=6)
    spec = json.loads(backend.to_str())
    assert indispensable_ids(spec) == {3, 5, 7}
    trimmed = trim_tokenizer_json(spec, np.array([1, 3, 5, 7]))
    assert Tokenizer.from_str(json.dumps(trimmed)).encode("w1 w1").ids == [2, 0, 0, 3, 1, 1]


def test_special_tokens_that_would_go_are_our_mistake():
    with pytest.raises(ValueError, match="cannot be spared"):
        trim_tokenizer_json(SPECS["bpe"], np.array([5, 6]))


def test_too_small_a_vocabulary_is_refused_with_the_smallest_possible():
    spec = SPECS["bytes"]
    with pytest.raises(UserError, match=r"max-size 255 is too small: .* are 2\d\d ids"):
        choose_ids(spec, count_ids(spec, SENTENCES), max_size=255)


def test_unknown_kinds_are_refused():
    with pytest.raises(UserError, match="model is Fancy"):
        indispensable_ids(SPECS["bpe"] | {"model": {"type": "Fancy"}})
    with pytest.raises(UserError, match="post-processor is Fancy"):
        indispensable_ids(SPECS["bpe"] | {"post_processor": {"type": "Fancy"}})
