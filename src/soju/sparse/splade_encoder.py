"""A SPLADE encoder with the tiled head, that saves what sentence-transformers loads by itself."""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from soju.core.errors import UserError
from soju.sparse.splade_inference import encode_sparse
from soju.sparse.splade_modules import fuse


class SpladeEncoder(SparseEncoder):
    """A `SparseEncoder` of any masked language model that never builds the ``[B, S, V]`` logits.

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
        self, model_name_or_path: str | Path | None = None, *, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        if model_name_or_path is not None:
            model_name_or_path = str(model_name_or_path)
            if Path(model_name_or_path).is_dir():
                kwargs["local_files_only"] = True  # or a relative path would be looked up on the hub
            kwargs["model_kwargs"] = {**(kwargs.get("model_kwargs") or {}), "use_safetensors": True}  # never a pickle
        try:
            super().__init__(model_name_or_path, **kwargs)
        except OSError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"{model_name_or_path}: no model with weights as safetensors can be loaded; {why}"
            ) from error
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
            tokenizer: Its tokenizer, which is copied.
            max_seq_length: As in the class.
            **kwargs: As in the class.

        Returns:
            The encoder.

        Raises:
            UserError: If the model is no masked language model.
        """

        class InMemory(Transformer):
            def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
                return model

        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            transformer = InMemory(folder, transformer_task="fill-mask")
        transformer.__class__ = Transformer
        modules = [transformer, SpladePooling("max")]
        return cls(modules=modules, max_seq_length=max_seq_length, local_files_only=True, **kwargs)

    def encode_sparse(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        max_active_terms: int | None = None,
        show_progress: bool = False,
    ) -> csr_array:
        """Return the term weights of texts, ``(B, V)``, as `soju.sparse.splade_inference.encode_sparse` does."""
        return encode_sparse(
            self, texts, batch_size=batch_size, max_active_terms=max_active_terms, show_progress=show_progress
        )

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write stock modules, which `SparseEncoder` loads where soju is not installed.

        Args:
            path: A folder, made when it is missing.
            *args: As in `SparseEncoder.save`.
            **kwargs: As in `SparseEncoder.save`.
        """
        training = {module: module.training for module in self.modules()}
        SparseEncoder.save(self.as_stock(), path, *args, **kwargs)
        for module, mode in training.items():  # writing the model card encodes examples
            module.training = mode

    def save_pretrained(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write what `save` writes, without a model card unless it is asked for: a trainer's checkpoints need none.

        Args:
            path: A folder, made when it is missing.
            *args: As in `SparseEncoder.save_pretrained`.
            **kwargs: As in `SparseEncoder.save_pretrained`.
        """
        self.save(path, *args, **{"create_model_card": False, **kwargs})

    def as_stock(self) -> SparseEncoder:
        """Return a stock encoder that shares this one's weights; this one stays as it is."""
        stock = copy.copy(self)
        stock.__class__ = SparseEncoder
        transformer, pooling = (copy.copy(module) for module in self)
        transformer.__class__, pooling.__class__ = Transformer, SpladePooling
        stock._modules = OrderedDict(zip(self._modules, (transformer, pooling), strict=True))
        stock.model_card_data = copy.copy(self.model_card_data)
        stock.model_card_data.register_model(stock)
        return stock

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[nn.Module], dict[str, Any]]:
        """Refuse what is no masked language model before its weights are read."""
        if Path(model_name_or_path).is_dir() and not Path(model_name_or_path, "config.json").is_file():
            raise FileNotFoundError(f"{model_name_or_path} has no config.json")
        hub = {key: kwargs[key] for key in ("token", "revision", "trust_remote_code", "local_files_only")}
        config = AutoConfig.from_pretrained(model_name_or_path, cache_dir=kwargs["cache_folder"], **hub)
        if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
            raise UserError(
                f"{model_name_or_path}: {', '.join(config.architectures or [config.model_type])} is no masked language "
                "model, so it has no weights for terms; choose a checkpoint whose architecture ends in ForMaskedLM"
            )
        return super()._load_default_modules(model_name_or_path, **kwargs)

    def _post_init(self) -> None:
        """Replace the stock modules: this is the last step of every way to construct an encoder."""
        model = self.transformers_model
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        fuse(list(self), name=name)
        super()._post_init()

    def _limit_length(self, wanted: int | None) -> None:
        """Cut texts at the number of tokens wanted, and never beyond the positions that the model knows."""
        limit = known_positions(self[0].model)
        if wanted is not None and not 1 <= wanted <= (limit or wanted):
            raise UserError(f"max_seq_length is {wanted}, but the model knows {limit} positions; choose 1 to {limit}")
        if wanted is not None or (limit is not None and self[0].max_seq_length > limit):
            self[0].max_seq_length = wanted or limit


def known_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a text can have, None when the configuration does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    for module in model.modules():
        embedding = getattr(module, "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            # The RoBERTa family counts from behind the padding id: of 514 positions 512 are for tokens.
            return int(positions - embedding.padding_idx - 1)
    return int(positions)
