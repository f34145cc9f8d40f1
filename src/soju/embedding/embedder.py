"""One model as it is measured: loaded by stock sentence-transformers, asked with its own prompts, each text once.

Shape letters: N = texts, D = dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.model_folder import find_model_folder
from soju.embedding.config import EvaluationSettings

Role = Literal["text", "query", "document"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under the name it has in tables."""

    name: str
    folder_or_model: Any
    """A folder or hub id, or a `SentenceTransformer` in memory."""


class Embedder:
    """Embeds texts and remembers their vectors."""

    def __init__(
        self, subject: Subject, settings: EvaluationSettings, *, load: Callable[[str], Any] | None = None
    ) -> None:
        """Load the model.

        Raises `UserError` if it cannot be loaded.
        """
        self.name = subject.name
        self._settings = settings
        given = subject.folder_or_model
        if isinstance(given, str | Path):
            self.model = load(str(given)) if load else load_model(str(given), dtype=settings.dtype)
        else:
            self.model = given
        self._memo: dict[tuple[str, str], NDArray[np.float32]] = {}

    def embed(self, texts: Sequence[str], role: Role = "text") -> NDArray[np.float32]:
        """Return the vectors of texts as the model gives them, ``(N, D)``; a text that was embedded is not again.

        Args:
            texts: N texts, N >= 1.
            role: What they are to the task, which decides the prompt.

        Returns:
            ``(N, D)`` float32, not normalised unless the model does so.

        Raises:
            UserError: If a vector is not finite; names the text.
        """
        prompt = self.prompt(role)
        new = [text for text in dict.fromkeys(texts) if (prompt, text) not in self._memo]
        if new:
            vectors_ND = self.encode(new, prompt)
            finite_N = np.isfinite(vectors_ND).all(axis=1)
            if not finite_N.all():
                text = new[int(np.argmin(finite_N))][:80]
                raise UserError(f'{self.name}: the vector of "{text}" is not finite; go back to an earlier checkpoint')
            self._memo.update(zip(((prompt, text) for text in new), vectors_ND, strict=True))
        return np.stack([self._memo[prompt, text] for text in texts])

    def encode(self, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        """Run the model on texts, whatever it has seen; see `embed`."""
        with self._as_measured():
            found = self.model.encode(
                list(texts),
                prompt=prompt,
                batch_size=self._settings.batch_size,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        vectors_ND: NDArray[np.float32] = found.detach().float().cpu().numpy()
        return vectors_ND

    def prompt(self, role: Role) -> str:
        """Return what is put before texts of a role: the setting, or else the model's own prompt."""
        settings, prompts = self._settings, self.model.prompts
        own = prompts.get(self.model.default_prompt_name) or ""
        text = own if settings.prompt is None else settings.prompt
        if role == "query":
            own_query = prompts.get("query", text) if settings.prompt is None else text
            return settings.query_prompt if settings.query_prompt is not None else own_query
        if role == "document":
            named = (prompts[name] for name in ("document", "passage", "corpus") if name in prompts)
            return settings.document_prompt if settings.document_prompt is not None else next(named, own)
        return text

    def decisive(self, *roles: Role) -> dict[str, Any]:
        """Return what decides a value apart from the weights: prompts, pooling, length, precision; for signatures."""
        first = next(iter(self.model.parameters()), None)
        return {
            "prompt": "+".join(json.dumps(self.prompt(role), ensure_ascii=False) for role in roles or ("text",)),
            "pooling": _pooling(self.model),
            "length": self._length(),
            "dtype": "none" if first is None else str(first.dtype).removeprefix("torch."),
        }

    def token_counts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return how many tokens each whole text has, ``(N,)``, without prompt and special tokens."""
        tokenizer = self.model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # a static model has one of the tokenizers package
            return np.array([len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)])
        # verbose=False: whole texts may be longer than the model reads, which is no matter for counting.
        found = tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return np.array([len(ids) for ids in found["input_ids"]], np.float64)

    def parameters(self) -> int:
        """Return how many numbers the model holds; shared ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def bytes(self) -> int:
        """Return how much memory its numbers take, in the precision it was loaded in."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def _length(self) -> int | None:
        return self._settings.max_length or self.model.max_seq_length

    @contextmanager
    def _as_measured(self) -> Iterator[None]:
        """Set the length, and leave a model in training exactly as it was found, module by module."""
        modes = [(module, module.training) for module in self.model.modules()]
        length = self.model.max_seq_length
        if self._settings.max_length is not None:
            self.model.max_seq_length = self._settings.max_length
        try:
            yield
        finally:
            if self._settings.max_length is not None:
                self.model.max_seq_length = length
            for module, mode in modes:
                module.training = mode


def load_model(name: str, *, dtype: str = "float32") -> Any:
    """Load a model with stock sentence-transformers: safetensors, adapters of ours, no code from the folder.

    Raises `UserError` if it cannot be found or loaded.
    """
    from soju.embedding.adapters import load_adapted

    folder = find_model_folder(name).path
    if not (folder / "modules.json").is_file():  # it would be given mean pooling, which may not be its own
        raise UserError(f"{name}: no modules.json, so nothing says how it pools; give a sentence-transformers folder")
    try:
        model = load_adapted(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )
    except (ImportError, OSError, ValueError, KeyError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no sentence-transformers model ({cause}); give the folder of a saved one") from None
    return model.eval()


def _pooling(model: Any) -> str:
    for module in model.modules():
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return mode if isinstance(mode, str) else "+".join(map(str, mode))
    return "none"
