"""M2M100 models in CTranslate2: converted without a tokenizer folder, and translating greedily or by beams.

The converters overwrite the tensors of the model they are given when they quantise, so they always get a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import M2M100ForConditionalGeneration

from soju.core.errors import require_extra
from soju.translation.data import Language, protect_source, restore
from soju.translation.vocabulary import CONTROLS, TAGS, Vocabulary


class _Pieces:
    """What CTranslate2's loader of M2M100 reads of a tokenizer."""

    special_tokens_map: dict[str, Any] = {}  # noqa: RUF012 - an attribute the loader reads
    num_madeup_words = 0
    bos_token, pad_token, eos_token, unk_token = CONTROLS

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.unk_token_id = CONTROLS.index(self.unk_token)
        self._tokenizer = vocabulary.tokenizer

    def get_vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def convert_ids_to_tokens(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    def convert_tokens_to_ids(self, piece: str) -> int:
        return int(self._tokenizer.get_vocab()[piece])


def convert(
    model: M2M100ForConditionalGeneration, vocabulary: Vocabulary, folder: Path, *, quantization: str | None = None
) -> None:
    """Write a model for CTranslate2.

    Args:
        model: Left as it is: what is converted is a copy.
        vocabulary: Of the model.
        folder: New folder.
        quantization: ``int8``, ``float16`` …; float32 when not given.
    """
    require_extra("converting a translator", "translation", "ctranslate2")
    loader = import_module("ctranslate2.converters.transformers").M2M100Loader()
    pieces = _Pieces(vocabulary)
    duplicate = copy.deepcopy(model).eval().to("cpu").float()
    specification = loader.get_model_spec(duplicate)
    loader.set_config(specification.config, duplicate, pieces)
    names = [pieces.convert_ids_to_tokens(number) for number in range(len(vocabulary))]
    specification.register_source_vocabulary(names)
    specification.register_target_vocabulary(names)
    specification.validate()
    specification.optimize(quantization=quantization)
    folder.mkdir(parents=True)
    specification.save(str(folder))
    vocabulary.save(folder)


class CTranslate2Model:
    """A converted model that translates texts."""

    def __init__(
        self,
        folder: Path,
        *,
        max_length: int,
        batch_size: int = 64,
        beams: int = 1,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        require_extra("translating", "translation", "ctranslate2")
        self._translator = import_module("ctranslate2").Translator(
            str(folder), device="cpu", intra_threads=1, inter_threads=1
        )
        self.vocabulary = vocabulary if vocabulary is not None else Vocabulary.load(folder)
        self.max_length, self.batch_size, self.beams = max_length, batch_size, beams

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """Translate texts; protected strings come through unchanged, and an empty text stays empty."""
        prepared = [protect_source(text) for text in texts]
        places = [place for place, text in enumerate(texts) if text.strip()]
        name = self.vocabulary.tokenizer.id_to_token
        rows = [[name(i) for i in self.vocabulary.encode_tagged(prepared[place][0], source)] for place in places]
        found = self._translator.translate_batch(
            rows,
            target_prefix=[[TAGS[target]]] * len(rows),
            beam_size=self.beams,
            max_batch_size=self.batch_size,
            # Behind the tag; `generate` counts the start and the end too.
            max_decoding_length=self.max_length - 1,
        )
        result, numbers = [""] * len(texts), self.vocabulary.tokenizer.get_vocab()
        for place, one in zip(places, found, strict=True):
            ids = [numbers[piece] for piece in one.hypotheses[0]]
            result[place] = restore(self.vocabulary.decode(ids), prepared[place][1])[0]
        return result
