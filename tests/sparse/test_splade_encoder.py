import copy
import functools
import json
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
)

from fixtures.pico_masked_lms import NEEDED, OTHERS, SIZES, build, word_piece
from fixtures.without_soju import encode_without_soju
from soju.core.errors import UserError
from soju.sparse import splade
from soju.sparse.splade import SpladeEncoder, hidden_states_only, known_positions, unpad

TEXTS = [*NEEDED, *OTHERS, "", "검색"]
STOCK = ["sentence_transformers.base.modules.transformer.Transformer"]
STOCK += ["sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling"]


def bert_untied():
    tokenizer = word_piece()[1]
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SIZES)), tokenizer


def distilbert():
    tokenizer = word_piece()[1]
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


KINDS = {
    "bert": lambda: build("word-piece"),
    "bert-untied": bert_untied,
    "xlm-roberta": lambda: build("unigram"),
    "roberta-untied": lambda: build("byte-bpe"),
    "modernbert": lambda: build("modern-bpe"),
    "distilbert": distilbert,
}


@functools.cache
def source(kind):
    """Return one model and tokenizer of a kind: training a tokenizer twice gives two of them."""
    torch.manual_seed(0)
    return KINDS[kind]()


def make(kind="bert", **options):
    model, tokenizer = source(kind)
    return SpladeEncoder.from_model(copy.deepcopy(model), tokenizer, max_seq_length=24, device="cpu", **options)


@pytest.fixture(params=list(KINDS))
def encoder(request):
    return make(request.param)


def save(encoder, folder):
    encoder.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def dense(encoder, texts=TEXTS, **options):
    return encoder.encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False, **options).float().numpy()


def test_it_encodes_what_sentence_transformers_encodes_from_its_folder(encoder, tmp_path):
    stock = SparseEncoder(save(encoder, tmp_path), device="cpu")
    expected = dense(stock)
    assert expected[:10].any(axis=1).all()
    np.testing.assert_allclose(dense(encoder), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_sparse(TEXTS, batch_size=3).toarray(), expected, atol=1e-5)
    again = SpladeEncoder(tmp_path, device="cpu")
    np.testing.assert_array_equal(dense(again), dense(encoder))
    assert again.max_seq_length == 24


def test_its_folder_names_stock_classes_and_holds_no_pickle(tmp_path):
    encoder = make()
    encoder.save(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"] for module in modules] == STOCK
    assert (tmp_path / "1_SpladePooling" / "config.json").exists()
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}
    card = (tmp_path / "README.md").read_text()
    assert "SparseEncoder" in card
    assert "SpladeEncoder" not in card


@pytest.mark.slow
def test_it_loads_where_soju_cannot_be_imported(tmp_path):
    encoder = make("xlm-roberta")
    save(encoder, tmp_path)
    np.testing.assert_allclose(encode_without_soju(tmp_path, TEXTS), dense(encoder), atol=1e-4)


def test_saving_copies_no_weights_and_leaves_the_live_model_as_it_was(tmp_path):
    encoder = make().train()
    encoder[1].eval()
    before = {name: value.data_ptr() for name, value in encoder.state_dict().items()}
    stock = encoder.as_stock()
    assert type(stock) is SparseEncoder
    assert [type(module) for module in stock] == [Transformer, SpladePooling]
    assert {name: value.data_ptr() for name, value in stock.state_dict().items()} == before
    encoder.save(str(tmp_path))  # with a model card, for which it encodes examples
    assert {name: value.data_ptr() for name, value in encoder.state_dict().items()} == before
    assert [type(module) for module in encoder] == [Transformer, SpladePooling]
    assert [module.training for module in (encoder, encoder[0].model, encoder[1])] == [True, True, False]
    assert encoder.model_card_data.model is encoder


def test_a_model_in_memory_is_wrapped_not_copied_and_still_gives_logits():
    model, tokenizer = build("word-piece")
    ids = torch.tensor([[2, 7, 8, 3]])
    logits = model(ids).logits
    encoder = SpladeEncoder.from_model(model, tokenizer, device="cpu")
    assert encoder.transformers_model is model
    assert encoder.tokenizer is not tokenizer
    assert torch.equal(model(ids).logits, logits)
    assert encoder.get_embedding_dimension() == model.config.vocab_size == logits.shape[-1]


def test_a_checkpoint_of_transformers_is_loaded_with_its_own_length(tmp_path):
    model, tokenizer = build("unigram")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = SpladeEncoder(tmp_path, device="cpu")
    # Of 64 positions of the RoBERTa family two are not for tokens; the tokenizer says nothing.
    assert encoder.max_seq_length == known_positions(model) == 62
    assert encoder.encode_sparse(["검색 " * 100]).nnz > 0
    np.testing.assert_allclose(dense(encoder), dense(SparseEncoder(str(tmp_path), device="cpu")), atol=1e-5)


def stock_twin(encoder):
    """Return a stock encoder with weights of its own."""
    transformer, pooling = (copy.deepcopy(module) for module in encoder.as_stock())
    return SparseEncoder(modules=[transformer, pooling], device="cpu")


def features(encoder, texts=TEXTS):
    return dict(encoder.preprocess(list(texts)))


def test_every_parameter_gets_the_gradient_of_the_stock_model(encoder):
    twin = stock_twin(encoder)
    target = torch.rand(len(TEXTS), encoder.get_embedding_dimension(), generator=torch.Generator().manual_seed(1))
    for model in (encoder, twin):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model[0].model.config.attention_probs_dropout_prob = 0.0
        for name in ("attention_dropout", "dropout_prob", "dropout"):
            for module in model.modules():
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        (model(features(model))["sentence_embedding"] * target).sum().backward()
    expected = dict(twin.named_parameters())
    assert dict(encoder.named_parameters()).keys() == expected.keys()
    for name, parameter in encoder.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_signed_maxima_and_weights_share_one_graph():
    encoder = make().train()
    output = encoder(features(encoder))
    maxima_BV, weights_BV = output["signed_maxima"], output["sentence_embedding"]
    assert maxima_BV.min() < 0
    torch.testing.assert_close(weights_BV, maxima_BV.relu().log1p())
    inactive = (maxima_BV < 0).nonzero()[0].tolist()
    maxima_BV[*inactive].backward()
    assert encoder.output_embedding.weight.grad[inactive[1]].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # sentence-transformers calls it
def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        encoder = make().train()
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            encoder.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules())
        encoder(features(encoder))["sentence_embedding"].sum().backward()
        found.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


class PullTogether(nn.Module):
    """A loss that sees weights and signed maxima."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels):
        first, second = (self.model(feature) for feature in features)
        distance = (first["sentence_embedding"] - second["sentence_embedding"]).square().mean()
        return distance + nn.functional.softplus(first["signed_maxima"]).mean()


def train(folder, *, resume=None, **settings):
    encoder = make()
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **settings,
    )
    rows = {"ko": NEEDED * 2, "en": OTHERS * 2}
    trainer = SparseEncoderTrainer(
        encoder, arguments, train_dataset=Dataset.from_dict(rows), loss=PullTogether(encoder)
    )
    trainer.train(resume_from_checkpoint=resume)
    return encoder


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    straight = train(tmp_path / "straight")
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-2"))
    for (name, one), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert not np.allclose(dense(straight), dense(make()))
    stock = SparseEncoder(str(tmp_path / "straight" / "checkpoint-4"), device="cpu")
    np.testing.assert_allclose(dense(stock), dense(straight), atol=1e-5)


def test_training_under_autocast_keeps_float32_weights(tmp_path):
    trained = train(tmp_path, bf16=True)
    assert {value.dtype for value in trained.state_dict().values()} == {torch.float32}
    assert not np.allclose(dense(trained), dense(make()))


def test_texts_come_back_in_their_order_from_any_batches_and_windows(monkeypatch):
    encoder = make()
    expected = dense(encoder)
    monkeypatch.setattr(splade, "WINDOW", 5)
    found = encoder.encode_sparse(TEXTS, batch_size=2, show_progress=True)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-5)
    assert found.dtype == np.float32
    assert found.has_sorted_indices
    assert (found.data > 0).all()


def test_only_the_largest_weights_are_kept_when_asked(tmp_path):
    encoder = make()
    few = encoder.encode_sparse(TEXTS, max_active_terms=4)
    np.testing.assert_allclose(few.toarray(), dense(encoder, max_active_dims=4), atol=1e-5)
    assert (np.diff(few.indptr) == 4).all()


def test_no_texts_give_no_rows():
    encoder = make()
    assert encoder.encode_sparse([]).shape == (0, encoder.get_embedding_dimension())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_active_terms": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must be >= 1"):
        make().encode_sparse(["검색"], **options)


def test_the_default_prompt_is_put_before_every_text():
    encoder = make(prompts={"query": "검색: "}, default_prompt_name="query")
    bare = make()
    found = encoder.encode_sparse(["엔진"]).toarray()
    np.testing.assert_allclose(found, dense(encoder, ["엔진"]), atol=1e-5)
    np.testing.assert_allclose(found, bare.encode_sparse(["검색: 엔진"]).toarray(), atol=1e-5)


def test_the_second_logarithm_of_opensearch_models_is_taken(tmp_path):
    transformer, _ = make().as_stock()
    stock = SparseEncoder(modules=[transformer, SpladePooling("max", "log1p_relu")], device="cpu")
    stock.save_pretrained(str(tmp_path), create_model_card=False)
    encoder = SpladeEncoder(tmp_path, device="cpu")
    np.testing.assert_allclose(encoder.encode_sparse(TEXTS).toarray(), dense(stock), atol=1e-5)
    save(encoder, tmp_path / "again")
    assert (
        json.loads((tmp_path / "again/1_SpladePooling/config.json").read_text())["activation_function"] == "log1p_relu"
    )


def test_padding_on_the_left_is_dropped_too():
    encoder = make()
    encoder.tokenizer.padding_side = "left"
    twin = stock_twin(encoder).eval()
    assert (features(encoder)["attention_mask"][:, 0] == 0).any()
    found, expected = (model.eval()(features(encoder))["sentence_embedding"] for model in (encoder, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_texts_joined_for_flash_attention_are_told_apart():
    hidden = torch.randn(1, 5, 16)
    found, lengths = unpad(hidden, {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)})
    assert torch.equal(found, hidden[0])
    assert lengths.tolist() == [2, 3]


def test_another_thread_gets_logits_while_one_wants_hidden_states():
    model = make()[0].model.eval()
    ids = torch.tensor([[2, 7, 3]])
    shapes = []
    with hidden_states_only():
        shapes.append(model(ids).logits.shape[-1])
        thread = threading.Thread(target=lambda: shapes.append(model(ids).logits.shape[-1]))
        thread.start()
        thread.join()
    shapes.append(model(ids).logits.shape[-1])
    assert shapes == [16, model.config.vocab_size, model.config.vocab_size]


def test_a_model_in_bfloat16_encodes(tmp_path):
    encoder = make("bert")
    save(encoder, tmp_path)
    low = SpladeEncoder(tmp_path, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    np.testing.assert_allclose(low.encode_sparse(TEXTS).toarray(), dense(encoder), atol=0.1)


def test_what_is_no_masked_language_model_is_refused(tmp_path):
    _, tokenizer = build("word-piece")
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"BertModel is no masked language model.*ends in ForMaskedLM"):
        SpladeEncoder(tmp_path, device="cpu")
    with pytest.raises(UserError, match="BertModel is no masked language model"):
        SpladeEncoder.from_model(model, tokenizer, device="cpu")


def test_other_pooling_than_the_maximum_is_refused():
    transformer, _ = make().as_stock()
    with pytest.raises(UserError, match="pools with 'sum'; only 'max'"):
        SpladeEncoder(modules=[transformer, SpladePooling("sum")], device="cpu")
    with pytest.raises(UserError, match=r"Transformer is no SPLADE model; expected Transformer \+ SpladePooling"):
        SpladeEncoder(modules=[transformer], device="cpu")


def test_a_model_that_adds_to_its_logits_is_refused():
    _, tokenizer = build("word-piece")
    config = EsmConfig(vocab_size=len(tokenizer), pad_token_id=0, mask_token_id=4, **SIZES)
    model = EsmForMaskedLM(config)
    nn.init.ones_(model.lm_head.bias)
    with pytest.raises(UserError, match="EsmForMaskedLM does more to its logits"):
        SpladeEncoder.from_model(model, tokenizer, device="cpu")


def test_lengths_beyond_the_models_positions_are_refused():
    model, tokenizer = build("unigram")
    with pytest.raises(UserError, match="max_seq_length is 64, but the model knows 62 positions"):
        SpladeEncoder.from_model(model, tokenizer, max_seq_length=64, device="cpu")


def test_pickled_weights_are_refused(tmp_path):
    save(make("bert"), tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model with weights as safetensors"):
        SpladeEncoder(tmp_path, device="cpu")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no model with weights as safetensors can be loaded"):
        SpladeEncoder(tmp_path, device="cpu")


def test_a_hub_id_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="nobody/nothing: no model with weights as safetensors can be loaded"):
        SpladeEncoder("nobody/nothing", device="cpu", local_files_only=True)
