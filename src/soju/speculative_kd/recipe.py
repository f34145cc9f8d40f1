"""Put knowledge into the weights of a chat model: a teacher reads it, the student learns to answer without it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.config import validate
from soju.core.errors import RegressionError, UserError
from soju.core.files import read_json_lines, write_json, write_manifest
from soju.core.model_folder import find_model_folder
from soju.core.recipe import Answer, DataReport, Evaluation, Recipe, Show, train
from soju.core.results import Score, Setting
from soju.core.run import Run
from soju.report import write_report
from soju.speculative_kd.config import SCRATCH, SELF, SpeculativeKdConfig, from_environment
from soju.speculative_kd.data import (
    Chat,
    Example,
    KnowledgeData,
    examples_of,
    general_examples,
    read_knowledge,
    refuse_long,
    split_general,
)
from soju.speculative_kd.evaluate import (
    FORGETTING,
    KNOWLEDGE_SCORE,
    NATS_A_BYTE,
    General,
    Measured,
    Subject,
    compare_measured,
    greedy_answers,
    measure,
    validate_knowledge,
)
from soju.speculative_kd.models import (
    Plan,
    available_memory,
    frozen_copy,
    load_models,
    memory_of,
    plan,
    refuse_without_memory,
)
from soju.speculative_kd.rollout import Rollout
from soju.speculative_kd.trainer import Lesson, SkdTrainer, skd_arguments, write_teacher_texts
from soju.training.gate import QualityGate, Threshold, passed_steps, read_verdicts, record_verdict
from soju.training.ranks import join_ranks, on_main_process
from soju.training.rollback import Attempt, RollbackSettings, Trained, train_judged
from soju.training.settings import stock_arguments

START, STUDENT, TEACHER, PRIVILEGED = "start", "student", "teacher", "teacher with knowledge"
"""What tables call the models."""
_DEMO = "lupi-pico"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and prompts of a run."""

    data: KnowledgeData
    planned: Plan
    examples: Sequence[Example]
    mixed: Sequence[Example]
    """General questions to train on."""
    measured: Sequence[Example]
    """General questions to measure with."""


def prepare(config: SpeculativeKdConfig, data: KnowledgeData) -> Prepared:
    """Read configs and tokenizers, make the prompts, refuse what does not match or fit; no weight is loaded."""
    planned = plan(config)
    examples = examples_of(data.trained, planned.student, planned.teacher)
    refuse_long(data.trained, examples, budget=config.rollout.max_new_tokens, contexts=planned.contexts)
    longest = max(len(ids) for one in examples for ids in (one.query, one.privileged))
    refuse_without_memory(memory_of(config, planned, longest=longest), available_memory())
    mixed, measured = split_general(data, mixed=config.mixing.share > 0, seed=config.seed)
    both = [general_examples(part, planned.student, planned.teacher) for part in (mixed, measured)]
    return Prepared(data, planned, examples, *both)


def run(
    config: SpeculativeKdConfig, folder: Run, *, data: KnowledgeData | None = None, resume: Path | None = None
) -> Run:
    """Distil, measure and report.

    Args:
        config: What to do.
        folder: Where everything goes; a run that was begun in it goes on.
        data: What `read_knowledge` read, when that was done before the folder was made.
        resume: A checkpoint to go on from.

    Returns:
        The run.

    Raises:
        RegressionError: If quality fell too often, or more was forgotten than allowed; the report is written.
        UserError: If data or models cannot be used.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    join_ranks()

    # 1. Read the facts; refuse broken rows, and set the control facts aside.
    data = data or read_knowledge(config.data, seed=config.seed)

    # 2. Compare both sides by config and tokenizer; make the prompts. Only the teacher's hold the knowledge.
    with PartialState().main_process_first():
        prepared = prepare(config, data)
    if PartialState().is_main_process:
        write_json(folder.folder / "data.json", data.counted())

    # 3. Load both; the start is kept to measure what is forgotten, and is the teacher when that is `self`.
    student, teacher = load_models(config, prepared.planned)
    start = teacher if config.teacher.model == SELF else frozen_copy(student)
    device = "cuda" if PartialState().device.type == "cuda" else "cpu"
    for model in (student, teacher, start):
        model.to(device)

    # 4. What is learnt: texts of student and teacher, or of the teacher alone, written once.
    lesson = make_lesson(config, prepared, teacher, start)
    texts: dict[str, list[int]] = {}
    if lesson.way.text == "teacher":
        texts = on_main_process(lambda: write_teacher_texts(lesson, folder.folder / "teacher_texts.json"))

    # 5. Train; each validation is judged, and training is rolled back when knowledge falls.
    trained = train_lesson(config, prepared, lesson, start, folder.folder, texts=texts, resume=resume)
    if not PartialState().is_main_process:
        return folder

    # 6. Save the best and the last as stock models, and from here on use what was saved.
    for checkpoint, target in ((trained.best, folder.best), (trained.last, folder.final)):
        save_model(checkpoint, target, prepared.planned.student)
    student = load_saved(folder.best).to(device)

    # 7. Measure start, student, and the teacher without and with the knowledge; report.
    measured = measure_run(config, prepared, student, teacher, start)
    return finish(config, prepared, measured, folder, trained)


def make_lesson(config: SpeculativeKdConfig, prepared: Prepared, teacher: Any, start: Any) -> Lesson:
    """Put questions, teacher and settings together."""
    share, own = config.mixing.share, config.mixing.target == "start" and start is not teacher
    return Lesson(
        prepared.examples,
        teacher,
        config.method,
        config.rollout.model_copy(update={"eos": prepared.planned.eos, "seed": config.seed}),
        config.loss,
        general=prepared.mixed,
        slots=round(share / (1 - share) * len(prepared.examples)) if prepared.mixed else 0,
        start=start if own else None,
    )


def train_lesson(
    config: SpeculativeKdConfig,
    prepared: Prepared,
    lesson: Lesson,
    start: Any,
    folder: Path,
    *,
    texts: dict[str, list[int]],
    resume: Path | None = None,
) -> Trained:
    """Train with validation, gate and rollback; without reference answers there is nothing to validate, and none."""
    planned = prepared.planned
    validation = validate_knowledge(prepared.data, planned.student, planned.eos, config.evaluation)

    def make_trainer(attempt: Attempt) -> SkdTrainer:
        chosen_by = KNOWLEDGE_SCORE if validation is not None else None
        arguments = stock_arguments(config.training, folder, seed=config.seed, chosen_by=chosen_by)
        student = copy.deepcopy(start).requires_grad_(True)
        return SkdTrainer(
            lesson=lesson,
            validation=validation,
            costs=folder / "costs.json",
            texts=texts,
            model=student,
            args=skd_arguments({**arguments, "data_seed": config.seed + attempt.data_order}),
            processing_class=planned.student.tokenizer,
            history=folder / "history.jsonl",
            learning_rate_scale=attempt.learning_rate_scale,
        )

    gate = KnowledgeGate(prepared.data, config.training.max_drop, folder / "verdicts.jsonl")
    rollbacks = RollbackSettings(max_rollbacks=config.training.max_rollbacks)
    return train_judged(make_trainer, gate, folder, rollbacks=rollbacks, resume=resume)


class KnowledgeGate:
    """Judges each validation against the best so far, by an absolute drop: the margin may well be below 0."""

    def __init__(self, data: KnowledgeData, max_drop: float, record: Path) -> None:
        texts = [fact.validation for fact in data.trained if fact.validation is not None]
        self._setting = Setting.of_texts(texts, subject=STUDENT, test_set="validation")
        self._gate = QualityGate([Threshold(metric=KNOWLEDGE_SCORE, max_drop=max_drop)])
        self._record = record

    def judge(self, step: int, metrics: Mapping[str, float], *, attempt: int) -> None:
        """Record the verdict on a validation; raise on every rank when it did not pass."""
        value = metrics[f"eval_{KNOWLEDGE_SCORE}"]
        score = self._setting.score(KNOWLEDGE_SCORE, value, unit=NATS_A_BYTE, higher_is_better=True)
        on_main_process(lambda: self._judge(score, step=step, attempt=attempt))

    def _judge(self, score: Score, *, step: int, attempt: int) -> None:
        rows = read_verdicts(self._record)
        passed = {one for one in passed_steps(rows) if one < step}
        earlier = [Score.from_json(row["scores"][0]) for row in rows if row["step"] in passed and row["passed"]]
        best = max(earlier, key=lambda one: one.value, default=score)
        verdict = self._gate.judge([score], [best])
        record_verdict(self._record, verdict, where="training", step=step, attempt=attempt, scores=[score])
        if not verdict.passed:
            raise RegressionError(f"step {step:,}: {'; '.join(verdict.reasons)}")


def save_model(checkpoint: Path, folder: Path, chat: Chat) -> None:
    """Save a checkpoint as a stock model with its tokenizer."""
    load_saved(checkpoint).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    write_manifest(folder)


def load_saved(folder: Path) -> Any:
    """Load a causal language model in float32, ready to answer."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def measure_run(
    config: SpeculativeKdConfig, prepared: Prepared, student: Any, teacher: Any, start: Any
) -> list[Measured]:
    """Measure start, student, and the teacher without and with the knowledge."""
    planned, settings = prepared.planned, config.evaluation
    sides: list[tuple[str, Any, Chat, bool]] = [
        (START, start, planned.student, False),
        (STUDENT, student, planned.student, False),
        (TEACHER, teacher, planned.teacher, False),
        (PRIVILEGED, teacher, planned.teacher, True),
    ]
    if teacher is start and config.student.system == config.teacher.system:
        del sides[2]  # without the knowledge it is the start
    subjects = [Subject(name, model, chat, planned.eos, privileged) for name, model, chat, privileged in sides]
    general: General | None = None
    if prepared.measured:
        texts = greedy_answers(subjects[0], [one.query for one in prepared.measured], settings)
        general = General(prepared.measured, texts, start)
    return [
        measure(
            one, prepared.data, settings, general=general if one.name in (START, STUDENT) else None, seed=config.seed
        )
        for one in subjects
    ]


def finish(
    config: SpeculativeKdConfig, prepared: Prepared, measured: Sequence[Measured], folder: Run, trained: Trained
) -> Run:
    """Write scores, comparisons, curves, answers and the report; refuse a student that forgot too much."""
    start, student = measured[0], measured[1]
    samples = config.evaluation.bootstrap_samples
    comparisons = compare_measured(student, start, samples=samples, seed=config.seed)
    folder.write_scores([score for one in measured for score in one.scores])
    write_json(folder.folder / "comparisons.json", [one.to_json() for one in comparisons])
    write_json(folder.folder / "figures.json", figures_of(read_json_lines(folder.folder / "history.jsonl")))
    asked = {fact.key: fact.tests[-1] for fact in prepared.data.trained if fact.tests}
    shown = list(student.answers)[: config.evaluation.shown]
    answers = [
        {"title": asked[key], "text": " · ".join(f"{name}: {one.answers.get(key, '')}" for name, one in columns)}
        for columns in [((START, start), (STUDENT, student), (PRIVILEGED, measured[-1]))]
        for key in shown
    ]
    summary = [
        f"{one.metric} on {one.test_set}: student minus start {one.difference:+.4f} nats a byte, 95 % interval "
        f"{one.interval.low:+.4f} to {one.interval.high:+.4f}."
        for one in comparisons
    ]
    if not asked:
        summary.append("No row has an answer and paraphrases, so knowledge was not measured and the last step is kept.")
    if trained.attempts > 1:
        summary.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    forgotten = [score for score in student.scores if score.name == FORGETTING]
    limit = config.evaluation.max_forgetting
    failed = [f"{one.name} is {one.value:.3g}, above {limit:.3g}" for one in forgotten if limit and one.value > limit]
    summary += [f"Too much was forgotten: {text}." for text in failed]
    write_json(folder.folder / "story.json", {"title": config.name, "summary": summary, "steps": answers})
    write_report(folder.folder)
    if failed:
        raise RegressionError(
            f"{'; '.join(failed)}; raise mixing.share, lower training.learning_rate, or set evaluation.max_forgetting"
        )
    return folder


_CURVES = {
    "loss": ("Divergence from the teacher on the texts of each step", {"loss": "loss"}, "nats a token"),
    "acceptance": ("Proposals", {"acceptance": "accepted", "rejected_by_rank": "rejected by rank"}, "share"),
    "gain": (
        "What the knowledge is worth to the teacher on the texts",
        {"privileged_gain": "its own", "misled_gain": "another row's"},
        "nats a token",
    ),
    "knowledge": ("Knowledge on paraphrases that validate", {"eval_knowledge": "margin"}, "nats a byte"),
}


def figures_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Describe the curves of a history."""
    figures = []
    for name, (title, keys, unit) in _CURVES.items():
        series = []
        for key, label in keys.items():
            points = {row["step"]: float(row[key]) for row in history if isinstance(row.get(key), int | float)}
            if points:
                series.append({"name": label, "x": list(points), "y": list(points.values())})
        if series:
            figure = {"id": name, "title": title, "kind": "line", "x_label": "optimiser step", "y_label": unit}
            figures.append({**figure, "series": series})
    return figures


def ask(model: Any, chat: Chat, question: str, *, max_new_tokens: int = 256) -> str:
    """Answer a question greedily, without any knowledge before it.

    Args:
        model: A causal language model.
        chat: Its tokenizer and template.
        question: Of a user.
        max_new_tokens: Tokens at most.

    Returns:
        The answer.
    """
    settings = SpeculativeKdConfig.model_fields["evaluation"].default.model_copy(
        update={"max_new_tokens": max_new_tokens}
    )
    ends = [model.generation_config.eos_token_id, chat.tokenizer.eos_token_id]
    eos = {one for value in ends for one in (value if isinstance(value, list) else [value]) if one is not None}
    (tokens,) = greedy_answers(Subject(STUDENT, model, chat, tuple(sorted(eos))), [chat.ask(question)], settings)
    text: str = chat.tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip()


def load_chat(folder: Path) -> tuple[Any, Chat]:
    """Load a model with its tokenizer."""
    from transformers import AutoTokenizer

    from soju.speculative_kd.config import StudentSettings

    found = find_model_folder(str(folder)).path
    tokenizer = AutoTokenizer.from_pretrained(found, local_files_only=True)
    return load_saved(found), Chat(tokenizer, StudentSettings(model=str(folder)), "student")


def describe_rollout(config: SpeculativeKdConfig, name: str) -> list[str]:
    """Write one text with the models as they start, and tell how each token came about.

    Args:
        config: Of a run.
        name: Id of a row, alone or after its language: ``en/food_001``.

    Returns:
        Lines to print.

    Raises:
        UserError: If there is no such row.
    """
    data = read_knowledge(config.data, seed=config.seed)
    facts = [fact for fact in data.facts if name in (fact.key, fact.row.id)]
    if not facts:
        raise UserError(f'no row has the id "{name}"; the first ones are {", ".join(f.key for f in data.facts[:3])}')
    planned = plan(config)
    student, teacher = load_models(config, planned)
    (example,) = examples_of(facts[:1], planned.student, planned.teacher)
    update = {"eos": planned.eos, "seed": config.seed, "implementation": "debug"}
    rollout = Rollout(student, teacher, config.rollout.model_copy(update=update), total_steps=1)
    privileged = example.plain if config.method == "skd" else example.privileged
    result = rollout([example.query], [privileged], ids=[example.id], keep_hidden=False)
    decode = planned.student.tokenizer.decode
    lines = [
        f"{event} | {decode([event.proposal])!r}" + (f" -> {decode([event.token])!r}" if event.outcome else "")
        for event in result.events
    ]
    return [*lines, f"acceptance {result.acceptance:.2f}", decode(result.tokens[0], skip_special_tokens=True)]


class SpeculativeKdRecipe(Recipe[SpeculativeKdConfig, KnowledgeData]):
    """See `soju.core.recipe.Recipe`."""

    def configure(self, values: Mapping[str, Any], *, place: str) -> SpeculativeKdConfig:
        """Check a configuration."""
        return validate(values, SpeculativeKdConfig, place=place)

    def from_environment(self, values: Mapping[str, Any], given: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
        """Let ``TEACHER_MODEL`` and ``STUDENT_MODEL`` override the file."""
        return from_environment(values, keep=given)

    def resume_from_environment(self) -> Path | None:
        """Return the checkpoint that ``RESUME_CHECKPOINT`` names."""
        named = os.environ.get("RESUME_CHECKPOINT")
        return Path(named) if named else None

    def check(self, config: SpeculativeKdConfig) -> DataReport[KnowledgeData]:
        """Read the facts; compare both sides where their files are on this machine."""
        data = read_knowledge(config.data, seed=config.seed)
        facts = [
            f"{len(data.trained):,} facts to train on, {len(data.control):,} control, {len(data.general):,} general"
        ]
        names = [name for name in (config.student.model, config.teacher.model) if name not in (SELF, SCRATCH)]
        remote = [name for name in names if _is_hub_id(name) and not Path(name).is_dir()]
        if remote:
            facts.append(f"{', '.join(remote)}: not on this machine; compared and measured before training begins")
        else:
            prepared = prepare(config, data)
            longest = max(len(one.privileged) for one in prepared.examples)
            needed = memory_of(config, prepared.planned, longest=longest)
            facts.append(f"longest prompt {longest:,} tokens; ends with {', '.join(map(str, prepared.planned.eos))}")
            facts.append("memory: " + ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in needed.items()))
        return DataReport(data=data, facts=facts, refused=data.log.refused, reasons=data.log.reasons)

    def train(
        self,
        config: SpeculativeKdConfig,
        run: Run,
        *,
        data: KnowledgeData | None = None,
        resume: bool | Path = False,
        workers: int = 2,
    ) -> Run:
        """Train, score and report."""
        return _run(config, run, data=data, resume=resume if isinstance(resume, Path) else None)

    def evaluate(
        self,
        models: Sequence[str],
        values: Mapping[str, Any],
        *,
        place: str,
        samples: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Measure models on the facts of a configuration, each compared with the first."""
        from soju.report.terminal import measured_tables

        config = self.configure(values if seed is None else {**values, "seed": seed}, place=place)
        settings = config.evaluation.model_copy(update={} if samples is None else {"bootstrap_samples": samples})
        data = read_knowledge(config.data, seed=config.seed)
        measured = []
        for name in models:
            model, chat = load_chat(Run(Path(name)).model_folder if Run(Path(name)).recipe else Path(name))
            subject = Subject(name, model, chat, (chat.tokenizer.eos_token_id,))
            measured.append(measure(subject, data, settings, seed=config.seed))
        comparisons = [
            comparison
            for other in measured[1:]
            for comparison in compare_measured(other, measured[0], samples=settings.bootstrap_samples, seed=config.seed)
        ]
        scores = [score for one in measured for score in one.scores]
        return Evaluation([measured_tables(scores, comparisons)], record=[score.to_json() for score in scores])

    def demo(self, folder: Path, show: Show) -> Answer | None:
        """Distil a pico teacher; it shows the machinery, since models from nothing know nothing."""
        from rich.text import Text

        from soju.report.terminal import run_tables

        show("Distilling a pico teacher that reads a text into a student that does not ...")
        trained = train(_DEMO, out=folder)
        show(run_tables(folder))
        show(f"Model   {trained.best}\nReport  {trained.report}")
        model, chat = load_chat(trained.best)
        return lambda question: Text(ask(model, chat, question, max_new_tokens=48))

    def owns(self, model: str) -> bool:
        """Tell whether a folder is a run of this recipe, or a causal language model."""
        if (recipe := Run(Path(model)).recipe) is not None:
            return recipe == "speculative_kd"
        config = Path(model) / "config.json"
        if not config.is_file():
            return False
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        return any(str(name).endswith("ForCausalLM") for name in names)

    def load(self, folder: Path) -> Any:
        """Load a model of transformers."""
        return load_saved(folder)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


_run = run
RECIPE = SpeculativeKdRecipe()
