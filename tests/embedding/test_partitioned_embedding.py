import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, Qwen3Config, Qwen3ForCausalLM

from fixtures.tiny_encoders import KINDS, VOCABULARY, batch, tiny_encoder
from soju.core.errors import UserError
from soju.embedding.trainer import PartitionedEmbedding, fold_embedding, partition_embedding

ROWS, FIRST, WIDTH = 9, 6, 4
IDS = torch.tensor([[0, 6, 8, 6], [5, 8, 0, 6]])
TEXTS = [[3, 25, 26, 29, 2], [25, 4]]


class Holder(nn.Module):
    """A model that is nothing but its embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value


def pair(*, padding_idx=None, dtype=torch.float32):
    """Return a plain embedding and the same partitioned."""
    torch.manual_seed(0)
    plain = nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx, dtype=dtype)
    nn.init.normal_(plain.weight)
    holder = Holder(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx, _weight=plain.weight.detach().clone()))
    return plain, partition_embedding(holder, FIRST)


def loss(embedding, ids=IDS):
    return (embedding(ids).float().sin() * torch.arange(1.0, WIDTH + 1)).square().sum()


@pytest.mark.parametrize("padding_idx", [None, 0, 8])
def test_values_and_gradients_are_those_of_a_plain_embedding(padding_idx):
    plain, ours = pair(padding_idx=padding_idx)
    assert torch.equal(ours(IDS), plain(IDS))
    loss(plain).backward()
    loss(ours).backward()
    torch.testing.assert_close(ours.tail.grad, plain.weight.grad[FIRST:])
    assert ours.base.grad is None


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_of_adamw_are_those_of_the_new_rows_and_old_rows_never_move(decay):
    plain, ours = pair()
    before = plain.weight.detach().clone()
    plain.weight.register_hook(lambda gradient: gradient * (torch.arange(ROWS) >= FIRST)[:, None])
    settings = {"lr": 0.1, "weight_decay": decay}
    optimisers = [torch.optim.AdamW(module.parameters(), **settings) for module in (plain, ours)]
    for _ in range(5):
        for module, optimiser in zip((plain, ours), optimisers, strict=True):
            optimiser.zero_grad()
            loss(module).backward()
            optimiser.step()
    torch.testing.assert_close(ours.tail, plain.weight[FIRST:])
    assert torch.equal(ours.base, before[:FIRST])
    assert torch.equal(plain.weight[:FIRST], before[:FIRST]) == (decay == 0)  # what masking a gradient does not prevent


def test_a_batch_without_new_ids_has_a_gradient_of_zeros():
    _, ours = pair()
    loss(ours, torch.tensor([[0, 5]])).backward()
    assert torch.equal(ours.tail.grad, torch.zeros(ROWS - FIRST, WIDTH))


def test_the_tail_is_float32_and_the_output_has_the_type_of_the_base():
    plain, ours = pair(dtype=torch.bfloat16)
    assert (ours.tail.dtype, ours.base.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(ours(IDS), plain(IDS))
    with torch.autocast("cpu", torch.bfloat16):
        loss(ours).backward()
    assert ours.tail.grad.dtype == torch.float32


def test_a_step_too_small_for_bfloat16_is_kept_until_it_is_folded():
    _, ours = pair(dtype=torch.bfloat16)
    with torch.no_grad():
        ours.tail.fill_(1.0).add_(1e-4)
    state = ours.state_dict()
    assert state["weight"].dtype == torch.float32
    _, other = pair(dtype=torch.bfloat16)
    other.load_state_dict(state)
    assert torch.equal(other.tail, ours.tail)
    assert torch.equal(other.base, ours.base)
    assert ours.weight[FIRST, 0] == 1.0


def test_a_checkpoint_loads_into_a_plain_embedding_and_back():
    plain, ours = pair()
    with torch.no_grad():
        ours.tail.add_(1)
    assert list(ours.state_dict()) == ["weight"]
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain(IDS), ours(IDS))
    _, fresh = pair()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(IDS), ours(IDS))


def test_checkpoints_of_another_size_or_without_the_weight_are_refused():
    _, ours = pair()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(9, 5\) in the checkpoint, \(9, 4\) here"):
        ours.load_state_dict({"weight": torch.zeros(9, 5)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        ours.load_state_dict({})


@pytest.mark.parametrize("kind", KINDS)
def test_a_partitioned_model_is_the_model_and_folds_back_bit_for_bit(kind):
    model, inputs = tiny_encoder(kind), batch(TEXTS)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        weight = model.get_input_embeddings().weight.clone()
        ours = partition_embedding(model, 25)
        assert torch.equal(model(**inputs).last_hidden_state, before)
        ours.tail.add_(0.5)
        changed = model(**inputs).last_hidden_state
        folded = fold_embedding(model)
        assert torch.equal(model(**inputs).last_hidden_state, changed)
    assert type(folded) is nn.Embedding
    assert torch.equal(folded.weight[:25], weight[:25])
    assert torch.equal(folded.weight[25:], weight[25:] + 0.5)
    assert (folded.num_embeddings, folded.weight.requires_grad) == (VOCABULARY, True)


@pytest.mark.parametrize("folds", [False, True])
def test_what_is_saved_is_stock_folded_or_not(tmp_path, folds):
    model, inputs = tiny_encoder(), batch(TEXTS)
    names = set(model.state_dict())
    partition_embedding(model, 25)
    if folds:
        fold_embedding(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = tiny_encoder().train()
        ours = partition_embedding(model, 25)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("tail" in name)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch(TEXTS)).last_hidden_state.square().sum().backward()
        gradients.append(ours.tail.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_the_model_runs_under_autocast():
    model = tiny_encoder()
    ours = partition_embedding(model, 25)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(TEXTS)).last_hidden_state.square().sum().backward()
    assert ours.tail.grad.isfinite().all()
    assert ours.tail.grad[[0, 1, 4]].abs().sum(dim=1).min() > 0  # ids 25, 26 and 29
    assert not ours.tail.grad[[2, 3]].any()


def test_ddp_reduces_the_tail_only(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _, ours = pair()
        wrapped = DistributedDataParallel(ours)
        for ids in (IDS, torch.tensor([[0, 1]])):  # the second has no new id: DDP would wait for a gradient
            loss(wrapped, ids).backward()
        assert not list(ours.buffers())
        assert [name for name, parameter in ours.named_parameters() if parameter.requires_grad] == ["tail"]
        assert ours.tail.grad.abs().max() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_memory_is_not_held_twice():
    _, ours = pair()
    assert ours.base.untyped_storage().nbytes() == FIRST * WIDTH * 4
    assert ours.tail.untyped_storage().nbytes() == (ROWS - FIRST) * WIDTH * 4


def test_what_cannot_be_partitioned_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    for embedding in (Scaled(3, 2), nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, sparse=True), nn.Linear(2, 3)):
        with pytest.raises(UserError, match="does more than look rows up"):
            partition_embedding(Holder(embedding), 1)
    for first_id in (0, 3):
        with pytest.raises(UserError, match="has 3 rows, none to train"):
            partition_embedding(Holder(nn.Embedding(3, 2)), first_id)
    with pytest.raises(ValueError, match="not partitioned"):
        fold_embedding(Holder(nn.Embedding(3, 2)))


def test_a_tied_output_is_refused():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    )
    with pytest.raises(UserError, match="output embedding is the same weight"):
        partition_embedding(model, 6)
    assert not isinstance(model.get_input_embeddings(), PartitionedEmbedding)
