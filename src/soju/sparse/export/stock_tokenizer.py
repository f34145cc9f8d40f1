"""The tokenizer in the form transformers reloads, piece ids unchanged."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import TokenizersBackend

from soju.core.errors import UserError


def stock_tokenizer(tokenizer: Tokenizer, *, max_length: int = 512, start_token: bool = False) -> TokenizersBackend:
    """Wrap a `tokenizers.Tokenizer` so that ``AutoTokenizer`` reloads it with the same pieces and ids.

    Padding uses the unknown piece: a pad token of its own would be one more id, hence one more dimension of every
    vector. Padded places have attention mask 0, so they never count. ``<unk>`` written in a text is cut like any other
    characters (``split_special_tokens``).

    Args:
        tokenizer: A model with an unknown token; it is copied.
        max_length: Pieces after which a text is cut.
        start_token: Put the unknown piece before every text, so that an empty text is not an empty sequence, which
            stock models cannot pool. For models that give the unknown piece no weight.

    Returns:
        A tokenizer to save beside a model.

    Raises:
        UserError: If the tokenizer has no unknown token or `max_length` is below 2.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; it must be 2 or more")
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")  # word pieces, words
    if unknown is None and model.get("unk_id") is not None:  # unigrams
        unknown = tokenizer.id_to_token(model["unk_id"])
    if unknown is None or tokenizer.token_to_id(unknown) is None:
        raise UserError("the tokenizer has no unknown token, which padding needs; build it with one")
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if start_token:
        copy.post_processor = TemplateProcessing(
            single=f"{unknown} $A", special_tokens=[(unknown, tokenizer.token_to_id(unknown))]
        )
    return TokenizersBackend(
        tokenizer_object=copy,
        unk_token=unknown,
        pad_token=unknown,
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
    )
