"""Greedy translation of held-out pairs, and what is measured of it: quality, errors, intervals by direction.

`DistillationValidator.validate` leaves ``step-004000.json``, a table ``.md``, all translations ``.tsv`` and statistics
of each sentence ``.npz`` in its folder, from which later comparisons are made without translating again.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import M2M100ForConditionalGeneration

from soju.core.errors import ConfigError, UserError
from soju.core.files import write_json, write_text
from soju.data.statistics import spread
from soju.evaluation.translation import (
    QualityWeights,
    SentenceStatistics,
    Tokens,
    english_tokens,
    korean_tokens,
    measure,
)
from soju.evaluation.translation_bootstrap import Estimate, derangement, difference, estimate
from soju.translation.config import ValidationConfig
from soju.translation.data import DIRECTIONS, Language, TranslationPair, protect_source, restore
from soju.translation.errors_ko import ErrorReport, analyse_errors, kiwi_analyser
from soju.translation.vocabulary import PAD, Vocabulary

Translate = Callable[[Sequence[str], Language, Language], list[str]]
"""Translates texts from one language into another."""
_EXAMPLES = 20


def direction_name(source: Language, target: Language) -> str:
    """Return ``ko-en`` or ``en-ko``."""
    return f"{source}-{target}"


def translate_greedily(
    model: M2M100ForConditionalGeneration,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    source: Language,
    target: Language,
    *,
    max_length: int,
    batch_size: int = 64,
    beams: int = 1,
) -> list[str]:
    """Translate by ``generate``, greedily unless told otherwise; protected strings come through unchanged.

    An empty text has an empty translation. Texts are sorted by length first, so that batches have little padding.
    """
    prepared = [protect_source(text) for text in texts]
    ids = [vocabulary.encode_tagged(text, source) for text, _ in prepared]
    order = sorted((place for place, text in enumerate(texts) if text.strip()), key=lambda place: len(ids[place]))
    result = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(ids[chosen[-1]])
        rows = torch.tensor([[*ids[place], *[PAD] * (longest - len(ids[place]))] for place in chosen]).to(model.device)
        with torch.no_grad():
            written = model.generate(
                input_ids=rows,
                attention_mask=(rows != PAD).long(),
                forced_bos_token_id=vocabulary.tag(target),
                num_beams=beams,
                do_sample=False,
                max_length=max_length,
            )
        for place, found in zip(chosen, written.tolist(), strict=True):
            result[place] = restore(vocabulary.decode(found), prepared[place][1])[0]
    return result


@contextmanager
def translator_of(
    model: M2M100ForConditionalGeneration, vocabulary: Vocabulary, settings: ValidationConfig
) -> Iterator[Translate]:
    """Yield what translates with a model, by CTranslate2 in float32 or by ``generate``.

    Raises `ConfigError` if CTranslate2 is asked for and not installed.
    """
    installed = importlib.util.find_spec("ctranslate2") is not None
    if settings.decoder == "ctranslate2" and not installed:
        raise ConfigError("validation.decoder: ctranslate2 is not installed; run: pip install 'soju[translation]'")
    if settings.decoder == "generate" or not installed:
        training = model.training
        model.eval()
        try:
            yield lambda texts, source, target: translate_greedily(
                model,
                vocabulary,
                texts,
                source,
                target,
                max_length=settings.max_length,
                batch_size=settings.batch_size,
            )
        finally:
            model.train(training)
        return
    from soju.translation.ctranslate import CTranslate2Model, convert

    folder = Path(tempfile.mkdtemp(prefix="soju-validation-"))
    try:
        convert(model, vocabulary, folder / "model")
        served = CTranslate2Model(folder / "model", max_length=settings.max_length, batch_size=settings.batch_size)
        yield served.translate
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, eq=False)
class DirectionResult:
    """One direction of one system."""

    hypotheses: list[str]
    statistics: SentenceStatistics
    scores: Mapping[str, float]
    interval: Estimate
    """Of the quality."""
    errors: ErrorReport


@dataclass(frozen=True, slots=True, eq=False)
class ValidationResult:
    """Both directions of one system."""

    clock: int
    directions: Mapping[str, DirectionResult]

    @property
    def quality(self) -> dict[str, float]:
        """Direction -> quality, a fraction."""
        return {name: found.scores["quality"] for name, found in self.directions.items()}


@dataclass(slots=True)
class TranslationQualityEvaluator:
    """Measures translations of one direction.

    Args:
        target: Language of the translations.
        weights: Of the quality.
        korean: Analyser for Korean tokens.
        draws: Bootstrap draws.
    """

    target: Language
    weights: QualityWeights = field(default_factory=QualityWeights)
    korean: Literal["auto", "ko-mecab", "kiwi"] = "auto"
    draws: int = 1_000

    @property
    def tokens(self) -> Tokens:
        """The tokens of the target language."""
        return english_tokens() if self.target == "en" else korean_tokens(self.korean)

    def evaluate(self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> DirectionResult:
        """Return scores, an interval of the quality, and errors.

        Raises `ConfigError` if a metric with a weight needs a tool that is not called here.
        """
        statistics = measure(hypotheses, references, self.tokens)
        analyse = kiwi_analyser() if self.target == "ko" and importlib.util.find_spec("kiwipiepy") else None
        return DirectionResult(
            list(hypotheses),
            statistics,
            statistics.scores(self.weights),
            estimate(statistics, weights=self.weights, draws=self.draws),
            analyse_errors(hypotheses, references, sources, target=self.target, analyse=analyse),
        )


class DistillationValidator:
    """Translates the same held-out pairs at each validation and measures the result.

    Args:
        pairs: Held-out pairs; at most `most` of them, spread over all, are translated in either direction.
        vocabulary: Of the models.
        settings: How to decode and to measure.
        folder: Gets the files of each validation; ``None`` writes none.
        most: Pairs of a direction.
    """

    def __init__(
        self,
        pairs: Sequence[TranslationPair],
        vocabulary: Vocabulary,
        settings: ValidationConfig,
        *,
        folder: Path | None = None,
        most: int | None = None,
    ) -> None:
        self.pairs = spread(list(pairs), settings.pairs if most is None else most)
        if len(self.pairs) < 2:
            raise UserError(f"validation: {len(self.pairs)} pairs; give at least 2")
        self.vocabulary, self.settings, self.folder = vocabulary, settings, folder

    @cached_property
    def domains(self) -> list[str]:
        """Domain of each pair."""
        return [pair.domain for pair in self.pairs]

    def validate(self, model: M2M100ForConditionalGeneration, clock: int) -> ValidationResult:
        """Translate and measure a model, and write the files of this step."""
        with translator_of(model, self.vocabulary, self.settings) as translate:
            return self.measure_system(translate, clock)

    def measure_system(self, translate: Translate, clock: int, *, label: str | None = None) -> ValidationResult:
        """Measure whatever translates; `label` names its files instead of the step."""
        directions = {}
        for source, target in DIRECTIONS:
            sources = [pair.text(source) for pair in self.pairs]
            references = [pair.text(target) for pair in self.pairs]
            evaluator = TranslationQualityEvaluator(
                target, self.settings.weights, self.settings.korean_tokens, self.settings.draws
            )
            directions[direction_name(source, target)] = evaluator.evaluate(
                translate(sources, source, target), references, sources
            )
        result = ValidationResult(clock, directions)
        if self.folder is not None:
            self._write(result, label or f"step-{clock:06d}")
        return result

    def chance(self, result: ValidationResult, *, seed: int = 0) -> dict[str, SentenceStatistics]:
        """Return the statistics of a system's output handed to the wrong sentences of the same domain."""
        moved = derangement(self.domains, seed=seed)
        found = {}
        for source, target in DIRECTIONS:
            name = direction_name(source, target)
            hypotheses = [result.directions[name].hypotheses[place] for place in moved]
            evaluator = TranslationQualityEvaluator(target, self.settings.weights, self.settings.korean_tokens)
            found[name] = measure(hypotheses, [pair.text(target) for pair in self.pairs], evaluator.tokens)
        return found

    def upper_ends(self, result: ValidationResult, best: int) -> dict[str, float]:
        """Return, by direction, the upper end of the interval of this quality minus that of an earlier step."""
        assert self.folder is not None
        return {
            name: difference(
                found.statistics,
                SentenceStatistics.load(statistics_path(self.folder, f"step-{best:06d}", name)),
                weights=self.settings.weights,
                draws=self.settings.draws,
            ).high
            for name, found in result.directions.items()
        }

    def _write(self, result: ValidationResult, label: str) -> None:
        assert self.folder is not None
        record: dict[str, Any] = {"clock": result.clock, "pairs": len(self.pairs), "directions": {}}
        table = [f"# Validation at step {result.clock:,}\n", "| direction | quality | 95 % | chrF++ | BLEU | 1 − TER |"]
        table.append("| --- | ---: | --- | ---: | ---: | ---: |")
        lines = ["direction\tdomain\tsource\treference\thypothesis"]
        for source, target in DIRECTIONS:
            name = direction_name(source, target)
            found = result.directions[name]
            found.statistics.save(statistics_path(self.folder, label, name))
            record["directions"][name] = {
                "scores": found.scores,
                "interval": found.interval.to_json(),
                "errors": found.errors.to_json(),
                "signature": found.interval.signature,
            }
            scores, interval = found.scores, found.interval
            table.append(
                f"| {name} | {scores['quality']:.4f} | {interval.low:.4f} – {interval.high:.4f} | "
                f"{scores['chrf++']:.4f} | {scores['bleu']:.4f} | {scores['1-ter']:.4f} |"
            )
            for pair, hypothesis in zip(self.pairs, found.hypotheses, strict=True):
                lines.append("\t".join((name, pair.domain, pair.text(source), pair.text(target), hypothesis)))
        write_json(self.folder / f"{label}.json", record)
        write_text(self.folder / f"{label}.md", "\n".join(table) + "\n")
        write_text(self.folder / f"{label}.tsv", "\n".join(lines) + "\n")


def statistics_path(folder: Path, label: str, direction: str) -> Path:
    """Return where the per-sentence statistics of a validation are."""
    return folder / f"{label}.{direction}.npz"


def worst_examples(
    validator: DistillationValidator, student: ValidationResult, teacher: ValidationResult
) -> list[dict[str, str]]:
    """Return the sentences on which the student loses most against the teacher, at most 20, worst first."""
    found = []
    for source, target in DIRECTIONS:
        name = direction_name(source, target)
        ours, theirs = (side.directions[name] for side in (student, teacher))
        weights = validator.settings.weights
        lost = theirs.statistics.sentence_quality(weights) - ours.statistics.sentence_quality(weights)
        for place in lost.argsort()[::-1][: _EXAMPLES // 2]:
            if lost[place] > 0:
                pair = validator.pairs[int(place)]
                found.append(
                    {
                        "direction": name,
                        "source": pair.text(source),
                        "reference": pair.text(target),
                        "teacher": theirs.hypotheses[int(place)],
                        "student": ours.hypotheses[int(place)],
                    }
                )
    return found
