import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer

from fixtures.pico_masked_lms import KINDS, NEEDED, OTHERS, build
from soju.core.errors import UserError
from soju.sparse.trimmed_model import check_trimmed, choose_ids, count_ids, special_ids, tokenizer_spec, trim_vocabulary


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """Return a model, its tokenizer, and both trimmed to the needed sentences."""
    model, tokenizer = build(request.param)
    spec = tokenizer_spec(tokenizer)
    kept = choose_ids(spec, count_ids(spec, NEEDED), max_size=65_535, required=special_ids(model, tokenizer))
    return model, tokenizer, trim_vocabulary(model, tokenizer, kept)


@torch.no_grad()
def logits(model, tokenizer, texts):
    return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits


def test_the_vocabulary_is_smaller_and_numbered_without_gaps(case):
    model, tokenizer, trimmed = case
    assert len(trimmed.old_ids) < 0.9 * len(tokenizer)
    assert trimmed.model.config.vocab_size == len(trimmed.old_ids) == len(trimmed.tokenizer)
    assert sorted(trimmed.tokenizer.get_vocab().values()) == list(range(len(trimmed.old_ids)))
    assert model.config.vocab_size >= len(tokenizer)  # the whole model is as it was


def test_texts_of_the_corpus_have_the_same_pieces_and_padding(case):
    _, tokenizer, (_, small, old_ids) = case
    for text in NEEDED:
        assert small.tokenize(text) == tokenizer.tokenize(text)
    before, after = (owner(NEEDED, padding=True)["input_ids"] for owner in (tokenizer, small))
    np.testing.assert_array_equal(old_ids[np.array(after)], before)


def test_logits_of_kept_ids_are_the_same(case):
    model, tokenizer, (small_model, small_tokenizer, old_ids) = case
    before, after = logits(model, tokenizer, NEEDED), logits(small_model, small_tokenizer, NEEDED)
    torch.testing.assert_close(after, before[:, :, old_ids], rtol=1e-5, atol=1e-5)


def test_other_texts_are_spelt_in_smaller_pieces_that_say_the_same(case):
    _, tokenizer, trimmed = case
    pieces = [trimmed.tokenizer.tokenize(text) for text in OTHERS]
    assert sum(map(len, pieces)) > sum(len(tokenizer.tokenize(text)) for text in OTHERS)
    korean = OTHERS[0]
    assert trimmed.tokenizer.unk_token not in trimmed.tokenizer.tokenize(korean)
    joined = trimmed.tokenizer.decode(trimmed.tokenizer(korean, add_special_tokens=False)["input_ids"])
    assert joined.replace(" ", "") == korean.replace(" ", "")


def test_special_tokens_keep_their_roles(case):
    model, tokenizer, (small_model, small_tokenizer, old_ids) = case
    assert small_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    for role in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        before, after = getattr(tokenizer, role), getattr(small_tokenizer, role)
        assert (before is None) == (after is None)
        assert before is None or old_ids[after] == before
        before, after = (getattr(owner.config, role, None) for owner in (model, small_model))
        assert after is None or old_ids[after] == before


def test_it_loads_with_the_auto_classes_alone(case, tmp_path):
    _, _, (small_model, small_tokenizer, _) = case
    small_model.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model) is type(small_model)
    assert [tokenizer.tokenize(text) for text in NEEDED + OTHERS] == [
        small_tokenizer.tokenize(text) for text in NEEDED + OTHERS
    ]
    torch.testing.assert_close(
        logits(model.eval(), tokenizer, NEEDED), logits(small_model, small_tokenizer, NEEDED), rtol=0, atol=0
    )


def test_tied_and_untied_heads_stay_so(case):
    model, _, (small_model, _, _) = case

    def tied(owner):
        return owner.get_output_embeddings().weight is owner.get_input_embeddings().weight

    assert tied(small_model) == tied(model)
    assert small_model.get_output_embeddings().weight.shape[0] == small_model.config.vocab_size


def test_trimming_is_proved_on_texts_that_lost_no_piece(case):
    model, tokenizer, trimmed = case
    assert len(NEEDED) <= check_trimmed(model, tokenizer, trimmed, NEEDED + OTHERS, tolerance=1e-4) < 10


def test_a_model_that_says_something_else_is_refused():
    model, tokenizer = build("unigram")
    other = trim_vocabulary(build("unigram", seed=1)[0], tokenizer, range(len(tokenizer)))
    with pytest.raises(UserError, match="logits differ by"):
        check_trimmed(model, tokenizer, other, NEEDED, tolerance=1e-4)


def test_a_tokenizer_that_splits_otherwise_is_refused():
    model, tokenizer = build("unigram")
    trimmed = trim_vocabulary(model, tokenizer, range(len(tokenizer)))
    trimmed.tokenizer.add_tokens(["sea"])
    with pytest.raises(UserError, match='"a search engine finds documents quickly" had the pieces'):
        check_trimmed(model, tokenizer, trimmed, NEEDED, tolerance=1e-4)


def test_the_callers_dice_are_not_thrown():
    model, tokenizer = build("word-piece")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trim_vocabulary(model, tokenizer, range(len(tokenizer)))
    assert torch.equal(torch.rand(1), expected)


def test_keeping_everything_changes_nothing():
    model, tokenizer = build("unigram")
    whole = trim_vocabulary(model, tokenizer, range(len(tokenizer)))
    assert whole.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert json.loads(whole.tokenizer.backend_tokenizer.to_str()) == tokenizer_spec(tokenizer)
    for (name, before), after in zip(model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


def test_half_precision_and_training_mode_stay():
    model, tokenizer = build("byte-bpe")
    trimmed = trim_vocabulary(model.to(torch.bfloat16).train(), tokenizer, range(300))
    assert trimmed.model.dtype == torch.bfloat16
    assert trimmed.model.training


@pytest.mark.parametrize(
    ("keep", "message"),
    [([], "keep_ids must be"), ([-1, 0, 1, 2, 3, 4], "keep_ids must be"), ([0, 1, 2, 3], "special tokens")],
)
def test_ids_that_do_not_exist_or_leave_a_special_token_out_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(*build("word-piece"), keep)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    model, tokenizer = build("word-piece")
    tokenizer.add_tokens(["학습"])
    with pytest.raises(UserError, match="ids beyond the 220 of the model"):
        trim_vocabulary(model, tokenizer, range(220))


def test_an_object_without_a_fast_tokenizer_is_refused():
    with pytest.raises(UserError, match="fast tokenizer"):
        tokenizer_spec(object())
    assert tokenizer_spec(BertTokenizer(vocab={"[UNK]": 0}))["model"]["type"] == "WordPiece"
