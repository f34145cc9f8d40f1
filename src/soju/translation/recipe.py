"""Distil an encoder–decoder translator in an exact number of steps, and prove how much quality it kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import M2M100ForConditionalGeneration, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from soju.core.config import to_yaml, validate
from soju.core.errors import ConfigError, IntegrityError, RegressionError, UserError
from soju.core.files import read_json_lines, write_json, write_manifest
from soju.core.recipe import Answer, DataReport, Evaluation, Recipe, Show, train
from soju.core.results import Interval, Score
from soju.core.run import Run, open_run_folder
from soju.translation.artefacts import export_artefacts, final_folder
from soju.translation.config import ClockedTraining, DistillationConfig, model_config
from soju.translation.data import DIRECTIONS, TranslationData, read_translation_data
from soju.translation.gate import TranslationGate, TranslationVerdict
from soju.translation.shrink import initial_student
from soju.translation.trainer import (
    DistillationObjective,
    Outcome,
    SupervisedObjective,
    Training,
    resolved,
    train_exactly,
)
from soju.translation.validation import (
    DistillationValidator,
    Translate,
    ValidationResult,
    translator_of,
    worst_examples,
)
from soju.translation.vocabulary import EncodedPairs, Vocabulary, collate, train_vocabulary

_LEAST_TEST_PAIRS = 300


@dataclass(slots=True)
class _Work:
    """What the steps of a run hand on."""

    config: DistillationConfig
    folder: Path
    data: TranslationData
    vocabulary: Vocabulary
    rows: EncodedPairs
    test: DistillationValidator
    callbacks: Sequence[TrainerCallback] = ()
    results: dict[str, ValidationResult] = field(default_factory=dict)
    """What was measured on the test documents, by system."""

    def validator(self, folder: Path) -> DistillationValidator:
        """Return what validates a training on the validation documents."""
        settings = self.config.validation
        return DistillationValidator(
            self.data.split.validation, self.vocabulary, settings, folder=folder / "validation"
        )

    def measure(self, name: str, model: M2M100ForConditionalGeneration) -> ValidationResult:
        """Measure a model on the test documents."""
        with translator_of(model, self.vocabulary, self.config.validation) as translate:
            return self.measure_translate(name, translate)

    def measure_translate(self, name: str, translate: Translate) -> ValidationResult:
        """Measure whatever translates on the test documents."""
        self.results[name] = self.test.measure_system(translate, 0, label=name)
        return self.results[name]


def run(
    config: DistillationConfig,
    run: Run,
    *,
    data: TranslationData | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Distil, validate, judge, export and report; a run that was begun in the folder goes on.

    Args:
        config: What to do.
        run: Where everything goes.
        data: What was read, when that was done before the folder was made.
        callbacks: Further callbacks of the student's trainer.

    Returns:
        The run.

    Raises:
        RegressionError: If the student kept too little; ``best/`` and the report are written, ``final/`` is not.
        WeakTeacherError: If the teacher is too close to chance for that to mean anything.
        UserError: If data or teacher cannot be used, or training stopped early.
    """
    disable_progress_bar()

    # 1. Read the pairs: cleaned, split by document, nothing on two sides.
    data = data or read_translation_data(config.data, seed=config.seed)
    write_json(run.folder / "data.json", data.statistics)

    # 2. The vocabulary: the teacher's, or one learnt from the training side.
    vocabulary = _vocabulary(config, data, run.folder)
    rows = EncodedPairs(data.split.train, vocabulary, max_length=config.validation.max_length)
    if not len(rows):
        raise UserError("data: every training pair is longer than validation.max_length; raise it")
    test = DistillationValidator(
        data.split.test,
        vocabulary,
        config.validation,
        folder=run.folder / "test",
        most=config.validation.test_pairs,
    )
    work = _Work(config, run.folder, data, vocabulary, rows, test, callbacks)

    # 3. The teacher: loaded, or trained first with the same validation.
    teacher = _teacher(work)
    if config.task == "teacher":
        _publish(teacher, work, run.best)
        return run

    # 4. A weak teacher makes retention meaningless: refuse it before anything is distilled.
    theirs = work.measure("teacher", teacher)
    chance = test.chance(theirs, seed=config.seed)
    gate = TranslationGate(
        config.gate,
        {name: found.statistics for name, found in theirs.directions.items()},
        chance,
        test.domains,
        config.validation.weights,
        config.validation.draws,
    )
    gate.check_teacher()

    # 5. Distil from the shrunk teacher in exactly N steps.
    outcome = _distil(work, teacher)
    student = _load_model(outcome.best)
    _publish(student, work, run.best)

    # 6. Judge the student and every form it ships in on the test documents.
    ours = work.measure("student", student)
    verdicts = [gate.judge("student", {name: one.statistics for name, one in ours.directions.items()})]
    if verdicts[0].passed:
        for name, translate in export_artefacts(student, vocabulary, run.folder / "artefacts", config.validation):
            found = work.measure_translate(name, translate)
            verdicts.append(gate.judge(name, {way: one.statistics for way, one in found.directions.items()}))
    write_json(run.folder / "gate.json", [verdict.to_json() for verdict in verdicts])

    # 7. Publish what passed, and report.
    shutil.rmtree(run.final, ignore_errors=True)
    if verdicts[0].passed and outcome.stopped is None:
        passed = [verdict.artefact for verdict in verdicts if verdict.passed]
        final_folder(run.best, run.folder / "artefacts", run.final, passed, _metadata(work, outcome, verdicts))
    _report(work, run, outcome, verdicts, gate)
    if outcome.stopped is not None:
        raise UserError(f"{run.folder}: {outcome.stopped}; best/ is the best that was accepted")
    if not verdicts[0].passed:
        raise RegressionError(f"{run.folder}: {'; '.join(verdicts[0].reasons)}; best/ and the report are written")
    return run


def _vocabulary(config: DistillationConfig, data: TranslationData, folder: Path) -> Vocabulary:
    own = folder / "vocabulary"
    if config.teacher.path is not None:
        return Vocabulary.load(config.teacher.path)
    if config.teacher.shape is None:
        raise ConfigError("teacher: give teacher.path, a folder with an M2M100 model, or teacher.shape to train one")
    if not (own / "tokenizer.json").is_file():  # once: a second training may differ in a few pieces
        texts = [text for pair in data.split.train for text in (pair.ko, pair.en)]
        train_vocabulary(texts, config.vocabulary_size).save(own)
    return Vocabulary.load(own)


def _teacher(work: _Work) -> M2M100ForConditionalGeneration:
    config = work.config
    if config.teacher.path is not None:
        return check_vocabulary(_load_model(config.teacher.path), work.vocabulary, config.teacher.path)
    settings, shape = config.teacher.training, config.teacher.shape
    assert shape is not None
    sizes = model_config(
        shape, len(work.vocabulary), dropout=config.teacher.dropout, max_length=config.validation.max_length
    )

    def make() -> M2M100ForConditionalGeneration:
        torch.manual_seed(config.seed)
        return M2M100ForConditionalGeneration(sizes)

    outcome = _train(work, work.folder / "teacher", make, SupervisedObjective(settings.label_smoothing), settings, ())
    if outcome.stopped:
        raise UserError(f"teacher: {outcome.stopped}; see {work.folder / 'teacher' / 'verdicts.jsonl'}")
    return _load_model(outcome.best)


def check_vocabulary(
    model: M2M100ForConditionalGeneration, vocabulary: Vocabulary, place: Path
) -> M2M100ForConditionalGeneration:
    """Return the model when its table fits the vocabulary (`UserError` otherwise)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != len(vocabulary):
        raise UserError(
            f"{place}: the model has {rows:,} ids and its tokenizer {len(vocabulary):,}; word-level distillation needs "
            "the vocabulary that the teacher was trained with"
        )
    return model


def _distil(work: _Work, teacher: M2M100ForConditionalGeneration) -> Outcome:
    config, start = work.config, work.folder / "student"
    if not (start / "config.json").is_file():  # once: every attempt starts from the same weights
        chosen = range(0, len(work.rows), max(1, len(work.rows) // (2 * config.student.init_pairs)))
        pairs = [work.rows[place] for place in chosen][: 2 * config.student.init_pairs]
        batches = [collate(pairs[place : place + 32]) for place in range(0, len(pairs), 32)]
        student, _ = initial_student(teacher, config.student.shape, batches, how=config.student.init, seed=config.seed)
        staged = work.folder / ".student"
        student.save_pretrained(staged)
        staged.rename(start)
    objective = DistillationObjective(teacher, config.loss, student_width=config.student.shape.d_model)
    make = partial(_load_model, start, dropout=config.student.dropout)
    return _train(work, work.folder, make, objective, config.training, work.callbacks)


def _train(
    work: _Work,
    folder: Path,
    make: Any,
    objective: Any,
    settings: ClockedTraining,
    callbacks: Sequence[TrainerCallback],
) -> Outcome:
    return train_exactly(
        Training(
            folder=folder,
            make_model=make,
            objective=objective,
            rows=work.rows,
            validator=work.validator(folder),
            settings=resolved(settings),
            degradation=work.config.degradation,
            seed=work.config.seed,
            callbacks=callbacks,
        )
    )


def _load_model(folder: Path, *, dropout: float = 0.0) -> M2M100ForConditionalGeneration:
    try:
        return M2M100ForConditionalGeneration.from_pretrained(
            folder,
            dropout=dropout,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        ).eval()
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder}: no M2M100 model ({str(error).splitlines()[0]}); check the path") from None


def _publish(model: nn.Module, work: _Work, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)  # type: ignore[operator]
    work.vocabulary.save(folder)
    write_manifest(folder)


def _metadata(work: _Work, outcome: Outcome, verdicts: Sequence[TranslationVerdict]) -> dict[str, Any]:
    return {
        "config": work.config.model_dump(mode="json"),
        "vocabulary": work.vocabulary.fingerprint,
        "best_step": outcome.best_clock,
        "account": outcome.account.summary(),
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "quality": {name: found.quality for name, found in work.results.items()},
    }


def scores_of(results: Mapping[str, ValidationResult]) -> list[Score]:
    """Return what was measured, for ``scores.json``."""
    found = []
    for subject, result in results.items():
        for direction, one in result.directions.items():
            for name in ("quality", "chrf++", "bleu", "1-ter", "rouge-l"):
                interval = Interval(one.interval.low, one.interval.high, one.interval.level)
                found.append(
                    Score(
                        name,
                        subject,
                        f"test/{direction}",
                        float(one.scores[name]),
                        "fraction",
                        True,
                        f"metric:{name}|{one.interval.signature}",
                        interval if name == "quality" else None,
                    )
                )
    return found


def _report(
    work: _Work, run: Run, outcome: Outcome, verdicts: Sequence[TranslationVerdict], gate: TranslationGate
) -> None:
    from soju.report import write_report

    run.write_scores(scores_of(work.results))
    history = [row for row in read_json_lines(run.folder / "verdicts.jsonl") if None not in row["quality"].values()]
    curves = [
        {
            "name": name,
            "x": [float(row["clock"]) for row in history],
            "y": [row["quality"][name] for row in history],
        }
        for name in history[0]["quality"]
    ]
    losses = [row for row in read_json_lines(run.folder / "history.jsonl") if row.get("loss") is not None]
    figures = [
        _figure("quality", "Quality at each validation", "quality", curves),
        _figure(
            "loss",
            "Loss",
            "loss",
            [{"name": "loss", "x": [float(row["step"]) for row in losses], "y": [row["loss"] for row in losses]}],
        ),
    ]
    write_json(run.folder / "figures.json", [figure for figure in figures if figure["series"][0]["x"]])
    write_json(
        run.folder / "examples.json",
        worst_examples(work.test, work.results["student"], work.results["teacher"]),
    )
    summary = [_account_sentence(outcome), *_verdict_sentences(verdicts)]
    steps = [
        {"title": f"Rollback at step {one.clock:,}", "text": f"Back to the weights of step {one.back_to:,}."}
        for one in outcome.account.rollbacks
    ]
    margins = {name: f"{found.low:.3f}" for name, found in gate.teacher_margins().items()}
    steps.append({"title": "Teacher above chance, at least", "text": str(margins)})
    write_json(run.folder / "story.json", {"title": work.config.name, "summary": summary, "steps": steps})
    write_report(run.folder)
    best = run.folder / "validation" / f"step-{outcome.best_clock:06d}.md"
    shutil.copyfile(best, run.folder / "validation" / "best_model_validation_report.txt")


def _figure(name: str, title: str, label: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "kind": "line",
        "x_label": "optimiser step",
        "y_label": label,
        "series": series,
    }


def _account_sentence(outcome: Outcome) -> str:
    account = outcome.account.summary()
    return (
        f"{account['executed']:,} of {account['total']:,} steps were executed: {account['kept']:,} kept, "
        f"{account['undone']:,} undone by {account['rollbacks']} rollbacks, {account['refused']} refused. The best "
        f"validation is that of step {outcome.best_clock:,}." + (f" It {outcome.stopped}." if outcome.stopped else "")
    )


def _verdict_sentences(verdicts: Sequence[TranslationVerdict]) -> list[str]:
    found = []
    for verdict in verdicts:
        word = "passed" if verdict.passed else "did not pass"
        bounds = ", ".join(
            f"{name} {one.retention.value:.3f} (at least {one.retention.low:.3f})"
            for name, one in verdict.directions.items()
            if one.retention is not None
        )
        stamp = "" if verdict.meaningful else " Not meaningful: the teacher is too close to chance."
        found.append(f"{verdict.artefact} {word} the gate; quality kept above chance: {bounds}.{stamp}")
    return found


class TranslationRecipe(Recipe[DistillationConfig, TranslationData]):
    """See `soju.core.recipe.Recipe`."""

    def configure(self, values: Mapping[str, Any], *, place: str) -> DistillationConfig:
        """Check a configuration."""
        return validate(values, DistillationConfig, place=place)

    def check(self, config: DistillationConfig) -> DataReport[TranslationData]:
        """Read all pairs, and see that a teacher is named."""
        if config.teacher.path is None and config.teacher.shape is None:
            missing = " and data.files" if not config.data.files and config.data.toy_pairs is None else ""
            raise ConfigError(
                f"{config.name}: give teacher.path, a folder with an M2M100 model{missing}"
                + (", sentence pairs" if missing else ", or teacher.shape to train one")
            )
        data = read_translation_data(config.data, seed=config.seed)
        sides = {"training": data.split.train, "validation": data.split.validation, "test": data.split.test}
        facts = [f"{name}: {len(pairs):,} pairs" for name, pairs in sides.items()]
        if len(data.split.test) < _LEAST_TEST_PAIRS:
            facts.append(f"{len(data.split.test)} test pairs prove little; give at least {_LEAST_TEST_PAIRS}")
        facts += [f"left out, {reason}: {count:,}" for reason, count in data.dropped.most_common()]
        return DataReport(data=data, facts=facts, refused=data.log.refused, reasons=data.log.reasons)

    def train(
        self,
        config: DistillationConfig,
        run_folder: Run,
        *,
        data: TranslationData | None = None,
        resume: bool | Path = False,
        workers: int = 2,  # one analyser thread is used
    ) -> Run:
        """Distil, judge and report."""
        if isinstance(resume, Path):
            raise UserError("--resume-from: translation goes on from its newest checkpoint; use --resume")
        return run(config, run_folder, data=data)

    def evaluate(
        self,
        models: Sequence[str],
        values: Mapping[str, Any],
        *,
        place: str,
        samples: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Measure models on the test documents of a configuration."""
        from soju.report.terminal import measured_tables

        config = self.configure(values, place=place)
        settings = config.validation if samples is None else config.validation.model_copy(update={"draws": samples})
        data = read_translation_data(config.data, seed=config.seed)
        results = {}
        for name in models:
            folder = Run(Path(name)).model_folder if Run(Path(name)).recipe else Path(name)
            vocabulary = Vocabulary.load(folder)
            test = DistillationValidator(data.split.test, vocabulary, settings, most=settings.test_pairs)
            with translator_of(_load_model(folder), vocabulary, settings) as translate:
                results[name] = test.measure_system(translate, 0)
        scores = scores_of(results)
        return Evaluation([measured_tables(scores)], record=[score.to_json() for score in scores])

    def demo(self, folder: Path, show: Show) -> Answer | None:
        """Distil a toy translator with fewer steps than the preset, and translate what the user types."""
        show("Training a toy teacher, distilling it, judging what was kept ...")
        steps = {"training.max_steps": 2_000, "training.eval_steps": 500, "gate.retention": 0.5}
        trained = train("translation-pico", out=folder, overrides=steps)
        from soju.report.terminal import run_tables

        show(run_tables(folder))
        show(f"Model   {trained.model_folder}\nReport  {trained.report}")
        model = self.load(trained.model_folder)
        return lambda text: str(model.translate([text])[0])

    def owns(self, model: str) -> bool:
        """Tell whether a folder is a run of this recipe or an M2M100 model."""
        recipe = Run(Path(model)).recipe
        if recipe is not None:
            return recipe == "translation"
        try:
            value = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(value, dict) and value.get("model_type") == "m2m_100"

    def load(self, folder: Path) -> Translator:
        """Load a model as a `Translator`."""
        return Translator(folder)


class Translator:
    """A distilled model, or any M2M100 with our vocabulary, that translates texts."""

    def __init__(self, folder: Path, *, max_length: int = 128) -> None:
        from soju.translation.validation import translate_greedily

        self.vocabulary = Vocabulary.load(folder)
        model = check_vocabulary(_load_model(folder), self.vocabulary, folder)
        room = model.config.max_position_embeddings // 2
        self._translate = partial(translate_greedily, model, self.vocabulary, max_length=min(max_length, room))

    def translate(self, texts: Sequence[str], *, target: str | None = None) -> list[str]:
        """Translate texts into the other language, or into `target`, ``ko`` or ``en``; empty ones stay empty."""
        from soju.data.log import HANGUL

        wanted = [target or ("en" if HANGUL.search(text) else "ko") for text in texts]
        result = [""] * len(texts)
        for source, into in DIRECTIONS:
            places = [place for place, one in enumerate(wanted) if one == into]
            for place, found in zip(
                places, self._translate([texts[place] for place in places], source, into), strict=True
            ):
                result[place] = found
        return result


class ModelDistiller:
    """A distillation from Python: ``ModelDistiller(config).run_distillation()``.

    Args:
        config: `DistillationConfig`.
        out: Run folder; ``runs/NAME`` when not given.
    """

    def __init__(self, config: DistillationConfig, *, out: Path | None = None) -> None:
        self.config = config
        self.folder = Path("runs") / config.name if out is None else out

    def run_distillation(self, *, resume: bool = False) -> dict[str, Any]:
        """Distil, judge and report; return the metadata of the result.

        Raises `RegressionError` when the gate did not pass, `ConfigError` when teacher or data are not given.
        """
        data = RECIPE.check(self.config).data
        opened = open_run_folder(self.folder, self.config, to_yaml(self.config), resumes=resume)
        finished = run(self.config, opened, data=data)
        if self.config.task == "teacher":
            return {"best": str(finished.best)}
        found: dict[str, Any] = json.loads((finished.final / "metadata.json").read_text(encoding="utf-8"))
        return found


RECIPE = TranslationRecipe()
