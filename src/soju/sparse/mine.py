"""Mine hard negatives: texts that a searcher ranks high and nobody calls an answer. What ``soju mine`` does.

A file of triplets is made part by part: whatever stops the work, finished parts stay, and going on gives the same
bytes. While ``OUT`` is in the making, ``OUT.parts`` holds ``settings.json`` and one JSON file for each finished part;
the file itself appears whole, at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from soju.core.errors import IntegrityError, UserError
from soju.core.files import atomic_writer, write_json, write_text
from soju.core.language import Language, language_of
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DOCUMENTS, TERMS, Row, TermRow, TripletRow
from soju.data.sources import FileSource, kind_of, resolve
from soju.sparse.miners import BM25, Bm25Model, DenseModel, Judge, Miner, SparseModel, bm25_model, open_model
from soju.sparse.model import PACKAGED_MODEL
from soju.sparse.negatives import (
    Answers,
    Candidate,
    Choice,
    Chosen,
    Question,
    RelatedTerms,
    Text,
    choose,
    distinct,
    questions_of,
)

CHUNK = 512
"""Questions of a part: the most that an interruption can lose."""
CACHE = Path("runs/teacher-vectors")
SHOWN = 20
"""Questions without a negative that the summary quotes."""
NOTHING_FOUND = "nothing found"
POSITIVE_UNKNOWN = "the filter model sees no likeness to the positive"
ALL_DROPPED = "every candidate dropped"


@dataclass(slots=True)
class MiningReport:
    """What mining gave. Questions are counted once for each positive."""

    questions: int = 0
    mined: int = 0
    """Questions with at least one negative."""
    negatives: int = 0
    """Rows written."""
    left: Counter[str] = field(default_factory=Counter)
    """Questions without a negative, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Candidates that are no negatives, by reason."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Rows by pair type and difficulty."""
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    """By file: ``questions``, ``mined``, and the reasons of `left`."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first `SHOWN` questions without a negative."""

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of one part, as `to_json` gave them."""
        self.questions += other["questions"]
        self.mined += other["mined"]
        self.negatives += other["negatives"]
        for name in ("left", "dropped", "kinds"):
            getattr(self, name).update(other[name])
        for source, counts in other["sources"].items():
            self.sources.setdefault(source, Counter()).update(counts)
        self.examples = (self.examples + other["examples"])[:SHOWN]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; counts are questions in ``left`` and ``sources``, candidates in ``dropped``."""
        return {
            "questions": self.questions,
            "mined": self.mined,
            "negatives": self.negatives,
            "left": _by_count(self.left),
            "dropped": _by_count(self.dropped),
            "kinds": _by_count(self.kinds),
            "sources": {source: dict(counts) for source, counts in self.sources.items()},
            "examples": self.examples,
        }


@dataclass(frozen=True, slots=True)
class Pool:
    """The documents of one language, each once, compared by letters and digits."""

    documents: list[Text]
    numbers: dict[str, int]
    """Position of each document by key."""


@dataclass(frozen=True, slots=True)
class _Context:
    """What the questions of every part are mined with."""

    pools: dict[Language, Pool]
    miners: dict[Language, Miner]
    judges: dict[Language, Judge]
    answers: Answers
    related: RelatedTerms
    choice: Choice
    depth: int
    miner_name: str


def mine(
    rows: Sequence[str],
    out: Path,
    *,
    miner: str = PACKAGED_MODEL,
    filter_model: str | None = None,
    corpus: Sequence[str] = (),
    terms: Sequence[str] = (),
    choice: Choice | None = None,
    depth: int = 100,
    prompt: str | None = None,
    cache: Path = CACHE,
    resume: bool = False,
    on_error: OnError = "stop",
) -> tuple[MiningReport, ReadLog]:
    """Write triplets with mined negatives, and a summary beside them, ``OUT.summary.json``.

    Args:
        rows: Files of pairs, passages, terms or triplets.
        out: A ``.jsonl`` file that is not there yet.
        miner: ``bm25``, or a sparse or dense model, see `soju.sparse.miners.open_model`.
        filter_model: The model whose scores tell false negatives; ``None`` is the miner, or `PACKAGED_MODEL` for BM25.
        corpus: Files of documents to mine besides the positives of the rows.
        terms: Files of term rows, for relations between terms and BM25's dictionary; those among `rows` serve too.
        choice: Which candidates become negatives; the defaults when ``None``.
        depth: Candidates of a question, >= 1.
        prompt: Put before every text of a dense model.
        cache: Folder that keeps vectors of dense models.
        resume: Go on with an interrupted run; the file gets the same bytes as without the interruption.
        on_error: ``stop`` at broken rows, or ``skip`` and count them.

    Returns:
        Counts, and what was read and refused.

    Raises:
        DataError: If rows are broken.
        UserError: If the output is taken, nothing can be mined from, or a model cannot be opened.
    """
    choice = choice or Choice()
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: triplets are written one JSON object a line; name the last argument OUT.jsonl")
    refuse_taken(out, resume=resume)
    # 1. Read what is asked and what answers it; the same question twice is one.
    log = ReadLog()
    asked, term_rows = read_questions(rows, terms, log, on_error)
    # 2. Gather the documents by language, for a negative is in the language of its positive; open the models.
    opened = _Opened.open(
        asked, term_rows, _corpus_texts(corpus, log, on_error), miner, filter_model, choice, cache=cache, prompt=prompt
    )
    questions = opened.questions
    # 3. Compare the settings with those of an interrupted run.
    settings = {
        "miner": dict(opened.mining.identity),
        "filter": None if opened.judging is None else dict(opened.judging.identity),
        "depth": depth,
        "choice": choice.model_dump(mode="json"),
        "chunk": CHUNK,
        "content": _fingerprint(questions, opened.pools, term_rows),
    }
    parts = Parts(out, settings, resume=resume)
    # 4. Search, score and choose, a part at a time.
    starts = range(0, len(questions), CHUNK)
    waiting = [number for number in range(len(starts)) if number not in parts]
    if waiting:
        context = opened.context(choice, depth, miner)
        for number in track(waiting, "mine"):
            parts.write(number, mine_part(questions[starts[number] : starts[number] + CHUNK], context))
    # 5. Join the parts; the file appears whole or not at all.
    report = _join(parts, len(starts), out)
    write_json(out.with_name(f"{out.name.removesuffix('.jsonl')}.summary.json"), {**report.to_json(), "run": settings})
    parts.remove()
    return report, log


def mine_negatives(
    rows: Sequence[Row],
    *,
    miner: str = PACKAGED_MODEL,
    filter_model: str | None = None,
    corpus: Sequence[str] = (),
    terms: Sequence[TermRow] = (),
    choice: Choice | None = None,
    depth: int = 100,
    prompt: str | None = None,
    cache: Path = CACHE,
) -> list[TripletRow]:
    """Find hard negatives: what a searcher ranks high and nobody calls an answer.

    Args:
        rows: Pairs, passages, terms or triplets. Each asks: a pair in both directions.
        miner: ``bm25``, or a sparse or dense model: a name, a folder or a hub id.
        filter_model: The model whose scores tell false negatives; ``None`` is the miner, or `PACKAGED_MODEL` for BM25.
        corpus: Texts to mine besides the positives of the rows.
        terms: Words that translate each other, none of which becomes a negative of the other; BM25's dictionary.
        choice: Which candidates become negatives; one a question when ``None``.
        depth: Candidates of a question, >= 1.
        prompt: Put before every text of a dense model.
        cache: Folder that keeps vectors of a dense model.

    Returns:
        Triplets in the order of the questions; none for a question whose every candidate was dropped. Scores are
        those of the filter model.

    Raises:
        UserError: If no row asks anything, or a model cannot be opened.

    Example:
        >>> import soju
        >>> pairs = [soju.PairRow("물을 마신다", "drinks water"), soju.PairRow("물이 끓는다", "the water boils")]
        >>> triplets = soju.sparse.mine_negatives(pairs, choice=soju.sparse.Choice(per_query=2))
        >>> isinstance(triplets[0], soju.TripletRow), triplets[0].query, triplets[0].negative
        (True, '물을 마신다', 'the water boils')
    """
    choice = choice or Choice()
    asked = [question for row in rows for question in questions_of(row)]
    if not asked:
        raise UserError("no row asks anything; give pairs, passages, terms or triplets")
    term_rows = [*(row for row in rows if isinstance(row, TermRow)), *terms]
    opened = _Opened.open(asked, term_rows, iter(corpus), miner, filter_model, choice, cache=cache, prompt=prompt)
    context, questions = opened.context(choice, depth, miner), opened.questions
    names = [field.name for field in fields(TripletRow)]
    return [
        TripletRow(**{name: row[name] for name in names})
        for start in track(range(0, len(questions), CHUNK), "mine")
        for row in mine_part(questions[start : start + CHUNK], context)["rows"]
    ]


def read_questions(
    rows: Sequence[str], terms: Sequence[str], log: ReadLog, on_error: OnError
) -> tuple[list[Question], list[TermRow]]:
    """Read rows of any kind that asks something; the first row of a file tells its kind."""
    questions: list[Question] = []
    term_rows: list[TermRow] = []
    for source in resolve(rows, DOCUMENTS, root=None, log=log):
        if not isinstance(source, FileSource):
            remedy = "save its rows as .jsonl and name the file"
            log.refuse_file(source.name, 0, "negatives cannot be mined for a hub data set", remedy, "hub")
            continue
        kind = kind_of(source, log)
        if kind is DOCUMENTS:
            remedy = "give pairs, passages, terms or triplets here and documents with --corpus"
            log.refuse_file(source.name, 1, "documents ask nothing", remedy, "no-question")
        elif kind is not None:
            for row in read_rows([source.name], kind, log=log):
                questions += questions_of(row, source.name)
                if isinstance(row, TermRow):
                    term_rows.append(row)
    if terms:
        term_rows += read_rows(terms, TERMS, log=log)
    log.raise_if_broken(on_error)
    if not questions:
        raise UserError(f"{', '.join(rows)}: no row asks anything; give pairs, passages, terms or triplets")
    return questions, term_rows


def _corpus_texts(corpus: Sequence[str], log: ReadLog, on_error: OnError) -> Iterator[str]:
    if corpus:
        for document in read_rows(corpus, DOCUMENTS, log=log):
            yield document.text
        log.raise_if_broken(on_error)


def gather(questions: Sequence[Question], corpus: Iterator[str]) -> dict[Language, Pool]:
    """Collect the positives of all questions, then the corpus, by language; texts alike but for signs are one."""
    pools: dict[Language, Pool] = {}
    for positives in (True, False):
        for text in (question.positive for question in questions) if positives else corpus:
            language, document = language_of(text), Text.of(text)
            pool = pools.setdefault(language, Pool([], {}))
            if document.key not in pool.numbers:
                pool.numbers[document.key] = len(pool.documents)
                pool.documents.append(document)
    return pools


Model = Bm25Model | SparseModel | DenseModel


@dataclass(frozen=True, slots=True)
class _Opened:
    """Questions, documents and models, before anything is searched."""

    questions: list[Question]
    answers: Answers
    related: RelatedTerms
    pools: dict[Language, Pool]
    mining: Model
    judging: SparseModel | DenseModel | None

    @classmethod
    def open(
        cls,
        asked: Sequence[Question],
        terms: Sequence[TermRow],
        corpus: Iterator[str],
        miner: str,
        filter_model: str | None,
        choice: Choice,
        *,
        cache: Path,
        prompt: str | None,
    ) -> _Opened:
        """Gather the documents and open the models; the same question twice is one."""
        if filter_model is not None and not choice.filters:
            raise UserError(f"--filter-model {filter_model}: nothing is filtered; set a bound or leave it out")
        questions = distinct(asked)
        pools = gather(questions, corpus)
        mining = bm25_model(terms) if miner == BM25 else open_model(miner, cache=cache, prompt=prompt)
        judging = _judge(filter_model, mining, cache, prompt) if choice.filters else None
        return cls(questions, Answers(asked), RelatedTerms(terms), pools, mining, judging)

    def context(self, choice: Choice, depth: int, miner: str) -> _Context:
        """Index the documents with the models."""
        miners, judges = _over(self.pools, self.questions, self.mining, self.judging)
        return _Context(self.pools, miners, judges, self.answers, self.related, choice, depth, miner)


def _judge(name: str | None, mining_model: Model, cache: Path, prompt: str | None) -> SparseModel | DenseModel:
    """Open the filter model; the miner's own serves unless it is BM25, which takes shared words for meaning."""
    if name == BM25:
        raise UserError("--filter-model bm25: BM25 cannot tell answers from shared words; give a sparse or dense model")
    if name is not None:
        return open_model(name, cache=cache, prompt=prompt)
    if isinstance(mining_model, Bm25Model):
        return open_model(PACKAGED_MODEL, cache=cache)
    return mining_model


def _over(
    pools: dict[Language, Pool], questions: Sequence[Question], mining: Model, judging: SparseModel | DenseModel | None
) -> tuple[dict[Language, Miner], dict[Language, Judge]]:
    miners: dict[Language, Miner] = {}
    judges: dict[Language, Judge] = {}
    for language, pool in pools.items():
        texts = [document.text for document in pool.documents]
        here = [question for question in questions if question.answer_language == language]
        if not here:  # documents of the corpus in a language nobody is answered in
            continue
        if judging is not None:
            judges[language] = judge = judging.over(texts, here)
        miners[language] = judge if mining is judging else mining.over(texts, here)
    return miners, judges


def mine_part(questions: Sequence[Question], context: _Context) -> dict[str, Any]:
    """Return ``rows``, triplets in the order of some questions, and ``counts``, see `MiningReport.to_json`."""
    found: dict[int, tuple[list[Candidate], float | None]] = {}
    for language in dict.fromkeys(question.answer_language for question in questions):
        numbers = [n for n, question in enumerate(questions) if question.answer_language == language]
        found.update(zip(numbers, _candidates([questions[n] for n in numbers], language, context), strict=True))
    rows: list[dict[str, Any]] = []
    report = MiningReport()
    for number, question in enumerate(questions):
        candidates, positive_score = found[number]
        known = context.answers.of(Text.of(question.query))
        bound = positive_score if context.judges else None
        chosen = choose(question, candidates, known, context.related, context.choice, positive_score=bound)
        rows += [
            {
                "query": question.query,
                "positive": question.positive,
                "negative": negative.text,
                "pair_type": question.pair_type,
                "difficulty": negative.difficulty,
                "negative_rank": negative.rank,
                "negative_score": round(negative.score, 4),
                "positive_score": None if positive_score is None else round(positive_score, 4),
                "miner": context.miner_name,
            }
            for negative in chosen.negatives
        ]
        _count(report, question, chosen)
    return {"rows": rows, "counts": report.to_json()}


def _candidates(
    questions: Sequence[Question], language: Language, context: _Context
) -> Iterator[tuple[list[Candidate], float | None]]:
    """Yield the candidates of each question and the score of its positive, in the same unit; unknown ones are None."""
    pool = context.pools[language]
    rankings, scores = context.miners[language].search(questions, context.depth)
    positives = [pool.numbers[Text.of(question.positive).key] for question in questions]
    if context.judges:
        asked = [np.append(ranking, own) for ranking, own in zip(rankings, positives, strict=True)]
        judged = context.judges[language].score(questions, asked)
        scores = [some[:-1] for some in judged]
        own_scores: list[float | None] = [float(some[-1]) for some in judged]
    else:  # the miner's own scores, which know the positive only where it was found
        found = [np.flatnonzero(ranking == own) for ranking, own in zip(rankings, positives, strict=True)]
        own_scores = [float(some[at[0]]) if len(at) else None for some, at in zip(scores, found, strict=True)]
    for ranking, some, own_score in zip(rankings, scores, own_scores, strict=True):
        pairs = zip(ranking.tolist(), some.tolist(), strict=True)
        yield [Candidate(pool.documents[number], score) for number, score in pairs], own_score


def _count(report: MiningReport, question: Question, chosen: Chosen) -> None:
    counts = report.sources.setdefault(question.source, Counter())
    report.questions += 1
    counts["questions"] += 1
    report.negatives += len(chosen.negatives)
    report.dropped.update(chosen.dropped)
    report.kinds.update(f"{question.pair_type}, {negative.difficulty}" for negative in chosen.negatives)
    if chosen.negatives:
        report.mined += 1
        counts["mined"] += 1
        return
    others = chosen.dropped.total() - chosen.dropped["known positive"] - chosen.dropped["the query itself"]
    reason = POSITIVE_UNKNOWN if chosen.positive_unknown else ALL_DROPPED if others else NOTHING_FOUND
    report.left[reason] += 1
    counts[reason] += 1
    if len(report.examples) < SHOWN:
        place = {"query": question.query, "positive": question.positive, "source": question.source}
        report.examples.append({**place, "reason": reason})


def _join(parts: Parts, count: int, out: Path) -> MiningReport:
    report = MiningReport()
    with atomic_writer(out) as file:
        for part in parts.read(count):
            report.add(part["counts"])
            for row in part["rows"]:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not report.negatives:
            raise UserError(
                f"{out}: not one negative passed ({', '.join(report.dropped | report.left)}); loosen the bounds, mine "
                "deeper or give a larger --corpus"
            )
    return report


def _fingerprint(questions: Sequence[Question], pools: dict[Language, Pool], terms: Sequence[TermRow]) -> str:
    """Hash all texts that decide what is written."""
    digest = hashlib.sha256()
    for texts in (
        (f"{q.query}\n{q.positive}\n{q.pair_type}\n{q.other_positives}" for q in questions),
        (document.text for pool in pools.values() for document in pool.documents),
        (f"{row.ko}\n{row.terms}" for row in terms),
    ):
        for text in texts:
            digest.update(text.encode() + b"\0")
        digest.update(b"\1")
    return digest.hexdigest()


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


SETTINGS = "settings.json"


class Parts:
    """The finished parts of one output file."""

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Begin, or go on.

        Args:
            out: The file in the making.
            settings: All that its content depends on, as JSON; going on with other settings would mix two results.
            resume: Go on when parts are there.

        Raises:
            UserError: If the file is there already, parts are there without `resume`, or were made with other settings.
        """
        self.folder = parts_folder(out)
        refuse_taken(out, resume=resume)
        if self.folder.exists():
            _refuse_others(self.folder, dict(settings))
        else:
            write_json(self.folder / SETTINGS, dict(settings))

    def __contains__(self, number: int) -> bool:
        return self._path(number).is_file()

    def write(self, number: int, value: Any) -> None:
        """Keep a finished part, finite JSON, atomically."""
        write_text(self._path(number), json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    def read(self, count: int) -> Iterator[Any]:
        """Yield the first `count` parts in order; one that is missing or no JSON is an `IntegrityError`."""
        for number in range(count):
            path = self._path(number)
            try:
                yield json.loads(path.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError) as error:
                raise IntegrityError(f"{path}: unreadable ({error}); remove it and go on with --resume") from None

    def remove(self) -> None:
        """Remove all parts, once the file is written."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def parts_folder(out: Path) -> Path:
    """Return the folder that holds the parts of a file in the making."""
    return out.with_name(f"{out.name}.parts")


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Refuse an output that is there, and parts of one unless `resume` (`UserError`); before anything long is done."""
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another name")
    folder = parts_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder}: holds an unfinished run; go on with --resume, or remove the folder")


def _refuse_others(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); remove the folder and begin again") from None
    now = json.loads(json.dumps(settings))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names)
        raise UserError(
            f"{folder}: was begun with other settings ({changed}); go on with the same ones, or remove the folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
