"""A SPLADE encoder that never builds ``[B, S, V]`` logits, and saves what sentence-transformers loads by itself.

Shape letters: B = texts, S = tokens of the longest text, N = tokens of all texts, H = hidden width, V = terms.
"""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from soju.core.errors import UserError
from soju.models.splade_head import signed_maxima, splade_weights
from soju.models.splade_inference import encode_sparse

_skip_output: ContextVar[bool] = ContextVar("_skip_output", default=False)


class OutputEmbedding(nn.Linear):
    """The output embedding of a masked language model, which hands its input through when told to.

    So the hidden states of any architecture are those that its own forward pass would multiply with the vocabulary, and
    the same model still gives logits to whoever asks for them.
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
        """Write ``signed_maxima`` ``(B, V)`` float32 into the features."""
        with hidden_states_only():
            features = super().forward(features, **kwargs)
        hidden_NH, lengths_B = unpad(features.pop(self.module_output_name), features)
        output = self.model.get_output_embeddings()
        features["signed_maxima"] = signed_maxima(hidden_NH, output.weight, output.bias, lengths_B)
        return features

    def unpadded_hidden_states(self, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the input of the output embedding for all tokens ``(N, H)`` and the number of each text's ``(B,)``."""
        with hidden_states_only():
            features = super().forward(features)
        return unpad(features[self.module_output_name], features)


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


def unpad(hidden: Tensor, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Drop the hidden states of padding.

    Args:
        hidden: ``(B, S, H)``, or ``(1, N, H)`` where the texts were joined for flash attention.
        features: What the model was called with.

    Returns:
        Hidden states ``(N, H)`` and lengths ``(B,)``.
    """
    if "cu_seq_lens_q" in features:
        return hidden.squeeze(0), features["cu_seq_lens_q"].diff().cpu()
    mask_BS = features["attention_mask"].bool()
    lengths_B = mask_BS.sum(dim=1).cpu()
    flat_NH = hidden.flatten(0, 1)
    if int(lengths_B.sum()) == len(flat_NH):
        return flat_NH, lengths_B
    # index_select, because its backward pass is deterministic on the CPU and on a GPU (no index occurs twice).
    return flat_NH.index_select(0, mask_BS.flatten().nonzero().squeeze(1)), lengths_B


class SpladeEncoder(SparseEncoder):
    """A `SparseEncoder` for any masked language model, with the tiled head.

    ``forward`` gives the term weights in ``sentence_embedding`` and the signed maxima they come from in
    ``signed_maxima``, both ``(B, V)`` and in one graph. It is saved as stock ``Transformer`` and ``SpladePooling``.

    Args:
        model_name_or_path: Folder or hub id of a masked language model, or of a SPLADE model saved by
            sentence-transformers. None with ``modules``.
        max_seq_length: Tokens after which texts are cut; by default what the tokenizer says.
        **kwargs: Passed on to `SparseEncoder`: ``device``, ``model_kwargs``, ``prompts``, ...

    Raises:
        UserError: If there is no model, or it is no masked language model with max pooling.
    """

    def __init__(
        self, model_name_or_path: str | None = None, *, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        if model_name_or_path is not None and Path(model_name_or_path).is_dir():
            kwargs["local_files_only"] = True  # or a relative path would be looked up on the hub
        try:
            super().__init__(model_name_or_path, **kwargs)
        except OSError as error:
            raise UserError(f"{model_name_or_path}: no model can be loaded; {str(error).splitlines()[0]}") from error
        self._limit_length(max_seq_length)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Wrap a model in memory; its weights are shared, not copied.

        Args:
            model: A masked language model.
            tokenizer: Its tokenizer.
            max_seq_length: As in the class.
            **kwargs: As in the class.

        Returns:
            The encoder.

        Raises:
            UserError: If the model is no masked language model.
        """

        class Loaded(Transformer):
            def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
                return model

        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            transformer = Loaded(folder, transformer_task="fill-mask")
        transformer.__class__ = Transformer
        modules = [transformer, SpladePooling("max")]
        return cls(modules=modules, max_seq_length=max_seq_length, local_files_only=True, **kwargs)

    def _limit_length(self, wanted: int | None) -> None:
        """Cut texts at the number of tokens wanted, and never beyond the positions that the model knows."""
        # Positions of the RoBERTa family start behind the padding id: of 514 only 512 are for tokens.
        offset = self[0]._infer_flatten_position_offset()
        positions = getattr(self[0].config, "max_position_embeddings", None)
        limit = None if positions is None or positions < 1 else positions - offset
        if wanted is not None:
            if wanted < 1 or (limit is not None and wanted > limit):
                raise UserError(
                    f"max_seq_length is {wanted}, but the model has 1 to {limit} positions; choose a number in between"
                )
            self.max_seq_length = wanted
        elif limit is not None and self.max_seq_length > limit:
            self.max_seq_length = limit

    def _post_init(self) -> None:
        """Replace the stock modules, in place: the last step of every way to construct an encoder."""
        _fuse(list(self), name=str(self[0].config.name_or_path or type(self[0].model).__name__))
        super()._post_init()

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[nn.Module], dict[str, Any]]:
        config = AutoConfig.from_pretrained(
            model_name_or_path,
            cache_dir=kwargs["cache_folder"],
            **{key: kwargs[key] for key in ("token", "revision", "trust_remote_code", "local_files_only")},
        )
        if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
            raise UserError(
                f"{model_name_or_path}: {config.architectures or config.model_type} is no masked language model, so it "
                "has no weights for terms; choose a checkpoint whose architecture ends in ForMaskedLM"
            )
        return super()._load_default_modules(model_name_or_path, **kwargs)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write stock modules, which `SparseEncoder` loads where soju is not installed.

        Args:
            path: A folder, made when it is missing.
            *args: As in `SparseEncoder.save`.
            **kwargs: As in `SparseEncoder.save`.
        """
        SparseEncoder.save(self.as_stock(), path, *args, **kwargs)

    def as_stock(self) -> SparseEncoder:
        """Return a stock encoder that shares this one's weights; this one stays as it is."""
        stock = copy.copy(self)
        stock.__class__ = SparseEncoder
        modules = [copy.copy(module) for module in self]
        modules[0].__class__, modules[1].__class__ = Transformer, SpladePooling
        stock._modules = OrderedDict(zip(self._modules, modules, strict=True))
        return stock

    def encode_sparse(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        max_active_terms: int | None = None,
        show_progress: bool = False,
    ) -> csr_array:
        """Return the term weights of texts, see `soju.models.splade_inference.encode_sparse`."""
        return encode_sparse(
            self, texts, batch_size=batch_size, max_active_terms=max_active_terms, show_progress=show_progress
        )


def _fuse(modules: list[Any], *, name: str) -> None:
    """Make stock modules fused ones; their parameters stay the same objects."""
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
    _check_hidden_states(transformer, output, name=name)


@torch.no_grad()
def _check_hidden_states(transformer: FusedTransformer, output: nn.Linear, *, name: str) -> None:
    """Refuse a model whose logits are not its output embedding applied to what the embedding is called with."""
    model = transformer.model
    if output.weight.device.type == "meta":
        return
    training = model.training
    model.eval()
    try:
        token_ids = torch.arange(4, device=model.device).remainder(output.out_features)[None]
        call = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        logits = model(**call).logits
        with hidden_states_only():
            hidden = model(**call).logits
        same = hidden.shape[-1] == output.in_features and torch.allclose(output(hidden), logits, rtol=1e-3, atol=1e-3)
    except RuntimeError:
        same = False
    finally:
        model.train(training)
    if not same:
        raise UserError(
            f"{name}: {type(model).__name__} does more to its logits than its output embedding does, which the tiled "
            "head cannot repeat; choose another architecture"
        )
