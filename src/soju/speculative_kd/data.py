"""Facts and prompts: what is trained, what is held out, and how each side is asked, as token ids.

Held out are questions, not facts: of a trained fact the first paraphrase validates and the others test. Control facts
are never trained on, in no language.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

from soju.core.errors import Problem, UserError
from soju.data.log import SKIP, Place, ReadLog, show
from soju.data.readers import read_rows
from soju.data.rows import KINDS, KnowledgeRow, Question
from soju.data.statistics import held_out, normalise_for_overlap, spread
from soju.speculative_kd.config import KNOWLEDGE, QUERY, KnowledgeDataSettings, Language, StudentSettings

TEMPLATES: dict[Language, str] = {
    "ko": f"다음 글을 읽고 질문에 답하세요.\n\n글: {KNOWLEDGE}\n\n질문: {QUERY}",
    "en": f"Read the text and answer the question.\n\nText: {KNOWLEDGE}\n\nQuestion: {QUERY}",
}
"""How the teacher is asked: first the text, then the question."""
DISTRACTORS = 3
"""Answers of other facts that a fact's own answer is compared with."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A row with its language and its place."""

    row: KnowledgeRow
    language: Language
    place: tuple[str, int]
    """File and line."""
    control: bool = False
    """Never trained on."""

    @property
    def key(self) -> str:
        """Name that no other fact has, in any language."""
        return f"{self.language}/{self.row.id}"

    @property
    def validation(self) -> str | None:
        """The paraphrase that validates."""
        return self.row.paraphrases[0] if self.row.answer and self.row.paraphrases else None

    @property
    def tests(self) -> tuple[str, ...]:
        """The paraphrases that test."""
        return self.row.paraphrases[1:] if self.row.answer else ()


@dataclass(frozen=True, slots=True)
class KnowledgeData:
    """Everything a run reads."""

    facts: tuple[Fact, ...]
    general: tuple[Question, ...]
    log: ReadLog = field(repr=False)

    @property
    def trained(self) -> list[Fact]:
        """Facts that are trained on."""
        return [fact for fact in self.facts if not fact.control]

    @property
    def control(self) -> list[Fact]:
        """Facts that are not."""
        return [fact for fact in self.facts if fact.control]

    def counted(self) -> dict[str, Any]:
        """Return what ``data.json`` says."""
        by_language = {
            language: {
                "trained": sum(fact.language == language for fact in self.trained),
                "control": sum(fact.language == language for fact in self.control),
            }
            for language in sorted({fact.language for fact in self.facts})
        }
        return {**self.log.to_json(), "facts": by_language, "general": len(self.general)}


def read_knowledge(settings: KnowledgeDataSettings, *, seed: int) -> KnowledgeData:
    """Read facts and general questions.

    Args:
        settings: Sources and shares.
        seed: Decides with the ids which facts are control.

    Returns:
        The facts, Korean ones first.

    Raises:
        DataError: If rows are broken, alone or together.
        UserError: If no fact is left to train on.
    """
    log = ReadLog()
    facts: list[Fact] = []
    sides: tuple[tuple[Language, Sequence[str]], ...] = (("ko", settings.ko), ("en", settings.en))
    for language, sources in sides:
        if sources:
            facts += _read_language(language, sources, settings, log)
    if settings.ko and settings.en:
        facts = _refuse(facts, _one_sided(facts), log)
    questions = read_rows(settings.general, KINDS["questions"], log=log, root=settings.root) if settings.general else ()
    general = tuple(questions)
    log.raise_if_broken(settings.on_error)
    if settings.max_facts is not None:
        chosen = set(spread(sorted({fact.row.id for fact in facts}), settings.max_facts))
        facts = [fact for fact in facts if fact.row.id in chosen]
    control = control_ids(facts, settings.control_share, seed=seed)
    data = KnowledgeData(tuple(replace(fact, control=fact.row.id in control) for fact in facts), general, log)
    if not data.trained:
        raise UserError("data: no fact is left to train on; give more rows, or lower data.control_share")
    return data


def _read_language(
    language: Language, sources: Sequence[str], settings: KnowledgeDataSettings, log: ReadLog
) -> list[Fact]:
    """Read one language; refuse what only all rows together show."""
    facts: list[Fact] = []
    asked: dict[str, tuple[str, int]] = {}

    def keep(row: KnowledgeRow, place: Place) -> None:
        first = asked.setdefault(normalise_for_overlap(row.query) or row.query, (place.file, place.line))
        if first != (place.file, place.line):
            what = f"the same question as {first[0]}:{first[1]} but for case, spaces and punctuation"
            place.refuse("query", what, f"ask differently, {SKIP}", "equal-queries")
        if not place.problems:
            facts.append(Fact(row, language, (place.file, place.line)))

    for _ in read_rows(sources, KINDS["knowledge"], log=log, root=settings.root, check=keep):
        pass
    facts = _refuse(facts, _paraphrases_that_are_asked(facts), log)
    return _refuse(facts, _lone_categories(facts), log)


Refused = Iterable[tuple[Fact, str, str, str, str]]
"""A fact with field, what is wrong, remedy and reason."""


def _refuse(facts: list[Fact], refused: Refused, log: ReadLog) -> list[Fact]:
    """Record problems that rows have only together, and return the other facts."""
    bad = set()
    for fact, name, what, remedy, reason in refused:
        bad.add(fact.key)
        file, line = fact.place
        log.refuse_row([Problem(file, line, name, what, remedy, reason)])
        source = log.source(file)
        source.kept, source.refused = source.kept - 1, source.refused + 1
    return [fact for fact in facts if fact.key not in bad]


def _paraphrases_that_are_asked(facts: list[Fact]) -> Refused:
    asked = {normalise_for_overlap(fact.row.query): fact for fact in facts}
    for fact in facts:
        for number, text in enumerate(fact.row.paraphrases):
            if other := asked.get(normalise_for_overlap(text)):
                what = f"{show(text)} is the question of {other.place[0]}:{other.place[1]}, which is trained on"
                yield fact, f"paraphrases[{number}]", what, f"ask differently, {SKIP}", "paraphrase-is-query"
                break


def _lone_categories(facts: list[Fact]) -> Refused:
    for members in by_category(facts).values():
        if len(members) == 1:
            what = f"{show(members[0].row.category)} has this row alone, so no other answer to compare with"
            yield members[0], "category", what, f"give it another category, {SKIP}", "lone-category"


def _one_sided(facts: list[Fact]) -> Refused:
    ids = {language: {fact.row.id for fact in facts if fact.language == language} for language in ("ko", "en")}
    for fact in facts:
        other = "en" if fact.language == "ko" else "ko"
        if fact.row.id not in ids[other]:
            what = f"{show(fact.row.id)} is not among the ids of data.{other}"
            yield fact, "id", what, f"add its translation there, {SKIP}", "one-sided-id"


def by_category(facts: Iterable[Fact]) -> dict[tuple[Language, str], list[Fact]]:
    """Group facts by language and category."""
    groups: dict[tuple[Language, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.language, fact.row.category].append(fact)
    return dict(groups)


def control_ids(facts: Sequence[Fact], share: float, *, seed: int) -> set[str]:
    """Choose the ids that are never trained on: in each category those of the smallest hashes.

    An id is control in both languages or in none, or the knowledge would arrive by translation.

    Args:
        facts: All of them.
        share: Of each category, rounded to whole ids.
        seed: Hashed with the ids.

    Returns:
        The ids.
    """
    categories: dict[str, dict[str, None]] = defaultdict(dict)
    placed: set[str] = set()
    for fact in facts:
        if fact.row.id not in placed:  # where the languages disagree about the category, the first counts
            placed.add(fact.row.id)
            categories[fact.row.category][fact.row.id] = None
    return {
        name
        for ids in categories.values()
        for name in sorted(ids, key=lambda name: _hash(f"{seed}:{name}"))[: round(share * len(ids))]
    }


def distractors(fact: Fact, facts: Sequence[Fact], *, count: int = DISTRACTORS) -> list[Fact]:
    """Choose facts of the same language and category, with answers, by hash: the same ones for every model and run."""
    others = [
        other
        for other in facts
        if other.row.category == fact.row.category
        and other.language == fact.language
        and other.row.id != fact.row.id
        and other.row.answer not in (None, fact.row.answer)
    ]
    return sorted(others, key=lambda other: _hash(f"{fact.row.id}:{other.row.id}"))[:count]


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def split_general(data: KnowledgeData, *, mixed: bool, seed: int) -> tuple[list[Question], list[Question]]:
    """Return general questions to train on, and to measure with; all are measured when none are `mixed` in."""
    if not mixed:
        return [], list(data.general)
    measured = {one.id for one in data.general if held_out(one.id, seed=seed, share=0.5)}
    if len(measured) in (0, len(data.general)):
        raise UserError("data.general: too few questions to train on some and measure others; give more")
    trained = [one for one in data.general if one.id not in measured]
    return trained, [one for one in data.general if one.id in measured]


class Chat:
    """Turns messages into the ids after which a model answers, with its own tokenizer and template."""

    def __init__(self, tokenizer: Any, settings: StudentSettings, side: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{side}.model {settings.model}: it has no chat template; take an instruct model")
        self.tokenizer = tokenizer
        self.settings = settings
        self.templates = {**TEMPLATES, **getattr(settings, "template", {})}

    def ask(self, message: str) -> list[int]:
        """Return the ids of one message of the user, with the opening of the answer."""
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        ids: list[int] = self.tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": message}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=self.settings.thinking,
        )
        return list(ids)

    def ask_with(self, query: str, knowledge: str, language: Language) -> list[int]:
        """Return the ids of a question after the text that answers it."""
        parts = {QUERY: query, KNOWLEDGE: knowledge}  # one pass: a text that holds "{query}" stays as it is
        pattern = "|".join(map(re.escape, parts))
        return self.ask(re.sub(pattern, lambda match: parts[match.group()], self.templates[language]))

    def answer(self, text: str) -> list[int]:
        """Return the ids of a reference answer, without an end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A question as ids. Only `query` ever reaches the student."""

    id: str
    """Keys the noise of its texts."""
    query: list[int]
    """The student's prompt."""
    plain: list[int]
    """The teacher's prompt without knowledge."""
    privileged: list[int]
    """The teacher's prompt with it; `plain` for general questions."""
    misled: list[int] | None = None
    """The teacher's prompt with the knowledge of another row."""
    language: str = ""
    category: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


def examples_of(facts: Sequence[Fact], student: Chat, teacher: Chat) -> list[Example]:
    """Return the questions that are trained on; misled by the next fact of the same language."""
    result = []
    for number, fact in enumerate(facts):
        row = fact.row
        others = [one for one in (*facts[number + 1 :], *facts[:number]) if one.language == fact.language]
        result.append(
            Example(
                id=fact.key,
                query=student.ask(row.query),
                plain=teacher.ask(row.query),
                privileged=teacher.ask_with(row.query, row.knowledge, fact.language),
                misled=teacher.ask_with(row.query, others[0].row.knowledge, fact.language) if others else None,
                language=fact.language,
                category=row.category,
            )
        )
    return result


def general_examples(questions: Sequence[Question], student: Chat, teacher: Chat) -> list[Example]:
    """Return general questions, which both sides read alone."""
    return [
        Example(f"general/{one.id}", student.ask(one.query), plain, plain, None, one.language, "general")
        for one in questions
        for plain in [teacher.ask(one.query)]
    ]


def refuse_long(facts: Sequence[Fact], examples: Sequence[Example], *, budget: int, contexts: tuple[int, int]) -> None:
    """Refuse rows whose prompts leave no room for the budget.

    Args:
        facts: Trained ones.
        examples: Of the same rows.
        budget: Tokens of a text.
        contexts: Of student and teacher, in tokens.

    Raises:
        DataError: With file and line of each.
    """
    log = ReadLog()
    for fact, example in zip(facts, examples, strict=True):
        for name, ids, context in zip(
            ("query", "knowledge"), (example.query, example.privileged), contexts, strict=True
        ):
            if len(ids) + budget > context:
                what = f"prompt of {len(ids):,} tokens and {budget:,} max_new_tokens exceed the context of {context:,}"
                remedy = f"shorten the text, lower rollout.max_new_tokens, {SKIP}"
                log.refuse_row([Problem(*fact.place, name, what, remedy, "too-long-for-context")])
    log.raise_if_broken()
