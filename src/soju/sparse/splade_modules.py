"""sentence-transformers' two SPLADE modules, fused: hidden states to signed maxima to weights, never logits.

Shape letters: B = texts, S = tokens of the longest text, N = tokens of all texts one after the other, H = hidden width,
V = terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from soju.core.errors import UserError
from soju.sparse.shared_gradient import share_gradient
from soju.sparse.splade_head import signed_maxima, splade_weights

_skip_output: ContextVar[bool] = ContextVar("_skip_output", default=False)


class OutputEmbedding(nn.Linear):
    """The output embedding of a masked language model, which hands its input through when told to.

    So the hidden states of any architecture are those that its own forward pass would multiply with the vocabulary,
    while the same model still gives logits to whoever else calls it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, or the hidden states inside `hidden_states_only`."""
        return input if _skip_output.get() else super().forward(input)


@contextmanager
def hidden_states_only() -> Iterator[None]:
    """Let masked language models return the input of their output embedding in the place of logits."""
    token = _skip_output.set(True)
    try:
        yield
    finally:
        _skip_output.reset(token)


class FusedTransformer(Transformer):
    """A masked language model that yields the signed maxima of its logits, not the logits."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Write ``signed_maxima`` ``(B, V)``, at least float32, into the features."""
        hidden_NH, lengths_B = self.hidden_states(features, **kwargs)
        output = self.output_embedding
        features["signed_maxima"] = signed_maxima(hidden_NH, output.weight, output.bias, lengths_B)
        return features

    def hidden_states(self, features: dict[str, Any], **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the input of the output embedding for all tokens ``(N, H)``, and how many each text has ``(B,)``."""
        with hidden_states_only():
            hidden_BSH = super().forward(features, **kwargs).pop(self.module_output_name)
        return unpad(hidden_BSH, features)

    @property
    def output_embedding(self) -> OutputEmbedding:
        """What hidden states are multiplied with, one row a term."""
        output = self.model.get_output_embeddings()
        assert isinstance(output, OutputEmbedding), type(output)
        return output


class FusedPooling(SpladePooling):
    """`SpladePooling` on signed maxima."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the term weights ``(B, V)`` into ``sentence_embedding``."""
        features["sentence_embedding"] = self.weights(features["signed_maxima"])
        return features

    def weights(self, maxima_BV: Tensor) -> Tensor:
        """Return the term weights of signed maxima."""
        weights_BV = splade_weights(maxima_BV)
        return splade_weights(weights_BV) if self.activation_function == "log1p_relu" else weights_BV


def unpad(hidden_BSH: Tensor, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Drop the hidden states of padding.

    Args:
        hidden_BSH: ``(B, S, H)``, or ``(1, N, H)`` where the texts were joined for flash attention.
        features: What the model was called with.

    Returns:
        Hidden states ``(N, H)`` and lengths ``(B,)``, these on the CPU.
    """
    if "cu_seq_lens_q" in features:
        return hidden_BSH.squeeze(0), features["cu_seq_lens_q"].diff().cpu()
    mask_BS = features["attention_mask"].bool()
    lengths_B = mask_BS.sum(dim=1).cpu()
    flat_NH = hidden_BSH.flatten(0, 1)
    if int(lengths_B.sum()) == len(flat_NH):
        return flat_NH, lengths_B
    # No index occurs twice, so the backward pass of index_select is deterministic on a GPU, too.
    return flat_NH.index_select(0, mask_BS.flatten().nonzero().squeeze(1)), lengths_B


def fuse(modules: list[Any], *, name: str) -> None:
    """Make stock modules fused ones in place; their parameters stay the same objects.

    Args:
        modules: ``Transformer`` and ``SpladePooling``.
        name: What to call the model in messages.

    Raises:
        UserError: If they are something else, or the model's logits are not its output embedding times hidden states.
    """
    if len(modules) != 2 or not isinstance(modules[0], Transformer) or not isinstance(modules[1], SpladePooling):
        names = " + ".join(type(module).__name__ for module in modules)
        raise UserError(f"{name}: {names} is no SPLADE model; expected Transformer + SpladePooling")
    transformer, pooling = modules
    if pooling.pooling_strategy != "max":
        raise UserError(f"{name}: pools with {pooling.pooling_strategy!r}; only 'max' can do without all logits")
    output = getattr(transformer.model, "get_output_embeddings", lambda: None)()
    if transformer.transformer_task != "fill-mask" or not isinstance(output, nn.Linear):
        raise UserError(
            f"{name}: {type(transformer.model).__name__} is no masked language model with a linear output embedding, "
            "so it has no weights for terms; choose a checkpoint whose architecture ends in ForMaskedLM"
        )
    output.__class__ = OutputEmbedding
    transformer.__class__, pooling.__class__ = FusedTransformer, FusedPooling
    pooling.embedding_dimension = output.out_features
    embedding = transformer.model.get_input_embeddings()
    if embedding.weight is output.weight:
        share_gradient(embedding)
    if not _hidden_states_give_logits(transformer):
        raise UserError(
            f"{name}: {type(transformer.model).__name__} does more to its logits than its output embedding does, which "
            "the tiled head cannot repeat; choose another architecture"
        )


@torch.no_grad()
def _hidden_states_give_logits(transformer: FusedTransformer) -> bool:
    """Compare the model's own logits for four tokens with what the head would make of its hidden states."""
    model, output = transformer.model, transformer.output_embedding
    if output.weight.device.type == "meta":
        return True
    token_ids = torch.arange(4, device=output.weight.device).remainder(output.out_features)[None]
    call = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    training = model.training
    model.eval()
    try:
        logits = model(**call).logits
        with hidden_states_only():
            hidden = model(**call).logits
        if hidden.shape[-1] != output.in_features:
            return False
        return torch.allclose(output(hidden), logits, rtol=1e-3, atol=1e-3)
    except RuntimeError:  # shapes that do not match where something is added to the logits
        return False
    finally:
        model.train(training)
