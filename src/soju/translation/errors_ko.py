"""What goes wrong in Korean–English translations, counted: from empty outputs to particles of the wrong form.

Everything is judged against the reference, so what the reference does as well is no error. Which morphemes a Korean
text has is asked of an analyser that is passed in (`kiwi_analyser`); without one, particles, speech levels and Korean
names are left out and are absent from the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from soju.core.errors import UserError
from soju.core.language import shared_kiwi

Target = Literal["ko", "en"]

KINDS = (
    *("empty", "copied", "untranslated", "repeated", "too_short", "too_long"),
    *("lost_number", "lost_name", "lost_placeholder", "wrong_particle", "mixed_levels"),
)
"""Names of the errors of one sentence."""
SHORT, LONG, LEAST_CHARACTERS = 0.5, 2.0, 5
"""A hypothesis outside this ratio to its reference, and by more than so many characters, has a wrong length."""
FOREIGN = 0.3
"""Share of letters of the source's script, above the reference's, from which a sentence counts as untranslated."""
WORD_LOOP, CHARACTER_LOOP = (4, 3), (10, 4)
"""Longest block looked at, in words and in characters, and how often in a row it must stand to be a loop."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PLACEHOLDER = re.compile(r"__p\d+__")
_LATIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]+")
_NAME = re.compile(r"(?<![.!?:\"“‘(])(?<=\s)[A-Z][a-z]+")
_WORD = re.compile(r"\S+")
_TRAILING = ".,!?…;:~)]}»>\"'’”"
_QUOTES = "\"'’”」』"
_NEEDS_FINAL = {"은": True, "는": False, "이": True, "가": False, "을": True, "를": False, "과": True, "와": False}
_DIRECTION = ("으로", "로")
_DIGIT_FINALS = dict(zip("0123456789", ("ㅇ", "ㄹ", "", "ㅁ", "", "", "ㄱ", "ㄹ", "ㄹ", ""), strict=True))
"""Last consonant of the digit as it is read; a number ending in 0 ends in 영, 십, 백, 천 or 만, none of them in ㄹ."""
_LETTER_FINALS = {"L": "ㄹ", "M": "ㅁ", "N": "ㄴ", "R": "ㄹ"}
_FORMAL = ("니다", "니까", "시오", "시다")
_INTIMATE = ("어", "아", "지", "야", "네", "군", "니", "냐", "자", "라", "거든", "까", "구나", "걸", "래")


class Morpheme(NamedTuple):
    """A piece of a text as the analyser sees it."""

    form: str
    """Contracted syllables are taken apart in it: ``했`` is 하 and 었."""
    tag: str
    """Part of speech in the Sejong tag set, for example ``NNG``, ``JX``, ``EF``."""
    start: int
    end: int


Analyser = Callable[[str], Sequence[Morpheme]]


@cache
def kiwi_analyser() -> Analyser:
    """Return the Kiwi of this process as an analyser."""
    kiwi = shared_kiwi()
    return lambda text: [
        Morpheme(token.form, token.tag.partition("-")[0], token.start, token.start + token.len)
        for token in kiwi.tokenize(text)
    ]


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """What `analyse_errors` found."""

    sentences: int
    places: dict[str, list[int]]
    """Kind -> sentences that have it, for those kinds that were looked for."""
    spacing_f1: float | None
    """Korean target only: F1 of the spaces, between the same two characters in hypothesis and reference."""
    particles_judged: int
    """Particles whose form was checked."""

    def rate(self, kind: str) -> float:
        """Return the share of sentences with an error, as a fraction."""
        return len(self.places[kind]) / self.sentences if self.sentences else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return counts and rates, without the places."""
        counts = {kind: {"count": len(places), "rate": self.rate(kind)} for kind, places in self.places.items()}
        return {
            "sentences": self.sentences,
            "errors": counts,
            "spacing_f1": self.spacing_f1,
            "particles_judged": self.particles_judged,
        }


def analyse_errors(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    *,
    target: Target,
    analyse: Analyser | None = None,
) -> ErrorReport:
    """Count the errors of one system in one direction.

    Args:
        hypotheses: Translations, ``(N,)``.
        references: ``(N,)``.
        sources: ``(N,)``.
        target: Language of the hypotheses.
        analyse: Korean analyser; read when the target is Korean.

    Returns:
        Where each kind of error is.

    Raises:
        UserError: If the numbers of texts differ.
    """
    if not len(hypotheses) == len(references) == len(sources):
        counts = f"{len(hypotheses):,} hypotheses, {len(references):,} references and {len(sources):,} sources"
        raise UserError(f"error analysis: {counts}; give one each")
    korean = analyse if target == "ko" else None
    kinds = [kind for kind in KINDS if korean or kind not in ("wrong_particle", "mixed_levels")]
    places: dict[str, list[int]] = {kind: [] for kind in kinds}
    judged, spaces = 0, [0, 0, 0]
    for index, (hypothesis, reference, source) in enumerate(zip(hypotheses, references, sources, strict=True)):
        found = _plain_errors(hypothesis, reference, source, target)
        if korean and hypothesis.strip():
            morphemes, theirs = korean(hypothesis), korean(reference)
            particles = check_particles(hypothesis, morphemes)
            judged += len(particles)
            found |= _korean_errors(hypothesis, reference, morphemes, theirs, particles)
        if target == "ko":
            spaces = [old + new for old, new in zip(spaces, spacing_counts(hypothesis, reference), strict=True)]
        for kind in found:
            places[kind].append(index)
    right, added, missed = spaces
    f1 = 2 * right / (2 * right + added + missed) if right + added + missed else None
    return ErrorReport(len(hypotheses), places, f1, judged)


def _plain_errors(hypothesis: str, reference: str, source: str, target: Target) -> set[str]:
    """Return the errors that need no morphemes."""
    if not hypothesis.strip():
        return {"empty"} if reference.strip() else set()
    checks = {
        "copied": _folded(hypothesis) == _folded(source) != _folded(reference),
        "untranslated": _foreign_share(hypothesis, target) > _foreign_share(reference, target) + FOREIGN,
        "repeated": is_loop(hypothesis, reference),
        "lost_number": bool(lost_numbers(hypothesis, reference, source)),
        "lost_name": bool(_lost_names(hypothesis, reference, source, target)),
        "lost_placeholder": Counter(_PLACEHOLDER.findall(source)) != Counter(_PLACEHOLDER.findall(hypothesis)),
    }
    return {kind for kind, is_so in checks.items() if is_so} | _length_error(hypothesis, reference)


def _length_error(hypothesis: str, reference: str) -> set[str]:
    ours, theirs = len("".join(hypothesis.split())), len("".join(reference.split()))
    if abs(ours - theirs) <= LEAST_CHARACTERS:
        return set()
    if ours < SHORT * theirs:
        return {"too_short"}
    return {"too_long"} if ours > LONG * theirs else set()


def _korean_errors(
    hypothesis: str,
    reference: str,
    ours: Sequence[Morpheme],
    theirs: Sequence[Morpheme],
    particles: Sequence[Particle],
) -> set[str]:
    """Return the errors that need morphemes."""
    known = {match.group().rstrip(_TRAILING) for match in _WORD.finditer(reference)}
    names = {name.form for name in theirs if name.tag == "NNP" and len(name.form) > 1 and name.form in reference}
    checks = {
        "wrong_particle": any(not particle.right and particle.word not in known for particle in particles),
        "mixed_levels": len(speech_levels(ours)) > 1 and len(speech_levels(theirs)) <= 1,
        "lost_name": any(name not in hypothesis for name in names),
    }
    return {kind for kind, is_so in checks.items() if is_so}


def _folded(text: str) -> str:
    return "".join(text.lower().split())


def _foreign_share(text: str, target: Target) -> float:
    """Return the share of letters in the script of the source."""
    hangul = sum("가" <= character <= "힣" or "ㄱ" <= character <= "ㆎ" for character in text)
    latin = sum(character.isalpha() and ord(character) < 0x0250 for character in text)
    return (latin if target == "ko" else hangul) / max(hangul + latin, 1)


def is_loop(hypothesis: str, reference: str) -> bool:
    """Tell whether some words, or some characters, stand in a row more often than a text says them, and the reference.

    The cost is linear in the texts: for each length of a block one pass.
    """
    loops = []
    for longest, least, split in ((*WORD_LOOP, str.split), (*CHARACTER_LOOP, _characters)):
        smallest = 1 if split is str.split else 2
        ours, theirs = (_most_repeats(split(text), smallest, longest) for text in (hypothesis, reference))
        loops.append(ours >= least and ours > theirs)
    return any(loops)


def _characters(text: str) -> list[str]:
    return list("".join(text.split()))


def _most_repeats(items: Sequence[str], smallest: int, longest: int) -> int:
    """Return how often the most repeated block of `smallest` to `longest` items stands in a row."""
    most = 1
    for size in range(smallest, longest + 1):
        run = 0
        for now, before in zip(items[size:], items, strict=False):
            run = run + 1 if now == before else 0
            most = max(most, run // size + 1)
    return most


def lost_numbers(hypothesis: str, reference: str, source: str) -> list[str]:
    """Return numbers that source and reference write in digits and the hypothesis does not; 1,000 is 1000."""
    ours, theirs, given = (Counter(_numbers(text)) for text in (hypothesis, reference, source))
    return sorted(((theirs & given) - ours).elements())


def _numbers(text: str) -> Iterator[str]:
    for match in _NUMBER.finditer(text):
        yield re.sub(r",(?=\d{3}(?:\D|$))", "", match.group())


def _lost_names(hypothesis: str, reference: str, source: str, target: Target) -> set[str]:
    """Return Latin names that are not in the hypothesis.

    Into Korean: Latin words that source and reference share. Into English: capitalised words within a sentence.
    """
    if target == "ko":
        names = set(_LATIN_WORD.findall(reference)) & set(_LATIN_WORD.findall(source))
    else:
        names = set(_NAME.findall(reference))
    folded = hypothesis.lower()
    return {name for name in names if name.lower() not in folded}


def spacing_counts(hypothesis: str, reference: str) -> tuple[int, int, int]:
    """Compare the spaces of two texts that need not say the same.

    Two neighbouring characters are compared where both texts have them, in whatever place. The cost is linear.

    Args:
        hypothesis: What is judged.
        reference: What its spaces are compared with.

    Returns:
        Spaces in both, in the hypothesis only, in the reference only.
    """
    ours, theirs = _boundaries(hypothesis), _boundaries(reference)
    right = added = missed = 0
    for pair in {pair for pair, _ in ours} & {pair for pair, _ in theirs}:
        spaced, joined = ours[pair, True], ours[pair, False]
        their_spaced, their_joined = theirs[pair, True], theirs[pair, False]
        same_spaced, same_joined = min(spaced, their_spaced), min(joined, their_joined)
        right += same_spaced
        added += min(spaced - same_spaced, their_joined - same_joined)
        missed += min(their_spaced - same_spaced, joined - same_joined)
    return right, added, missed


def _boundaries(text: str) -> Counter[tuple[str, bool]]:
    """Count pairs of neighbours, a space between them or not."""
    counts: Counter[tuple[str, bool]] = Counter()
    before, spaced = "", False
    for character in text.strip():
        if character.isspace():
            spaced = True
            continue
        if before:
            counts[before + character, spaced] += 1
        before, spaced = character, False
    return counts


class Particle(NamedTuple):
    """A particle that has two forms, and whether it is the right one."""

    word: str
    """The written word that ends with it."""
    particle: str
    right: bool


def check_particles(text: str, morphemes: Sequence[Morpheme]) -> list[Particle]:
    """Check the form of the particles 은/는, 이/가, 을/를, 과/와 and 으로/로.

    The first form stands after a final consonant; 로 also after ㄹ. A word is looked at when the analyser sees a noun,
    number, foreign word or another particle end where the particle begins; what the analyser calls the particle itself
    is not read, because a wrong form often passes for something else. Latin words in small letters are left out: how
    they are read is not written.

    Args:
        text: A Korean text.
        morphemes: What an analyser makes of it.

    Returns:
        The particles in order.
    """
    nominal_ends = {m.end for m in morphemes if m.tag[:1] in "NJ" or m.tag in ("XSN", "SN", "SL", "ETN", "SSC")}
    found = []
    for match in _WORD.finditer(text):
        word = match.group().rstrip(_TRAILING)
        for particle in (*_DIRECTION, *_NEEDS_FINAL):
            stem = word[: len(word) - len(particle)]
            if not word.endswith(particle) or match.start() + len(stem) not in nominal_ends:
                continue
            final = final_consonant(stem.rstrip(_QUOTES))
            if final is not None:
                found.append(Particle(word, particle, _fits(particle, final)))
            break
    return found


def _fits(particle: str, final: str) -> bool:
    if particle in _DIRECTION:
        return (particle == "으로") == (final not in ("", "ㄹ"))
    return _NEEDS_FINAL[particle] == bool(final)


def final_consonant(stem: str) -> str | None:
    """Return the last consonant of a word as it is read, ``""`` for a vowel, ``None`` when that is not written."""
    if not stem:
        return None
    last = stem[-1]
    if "가" <= last <= "힣":
        index = (ord(last) - ord("가")) % 28
        return {0: "", 8: "ㄹ"}.get(index, "ㅇ")  # which of the others it is does not matter
    if last in _DIGIT_FINALS:
        return _DIGIT_FINALS[last]
    letters = re.search(r"[A-Z]+$", stem)  # read letter by letter: IBM ends like 엠
    if letters and (len(letters.group()) > 1 or letters.group() == stem):
        return _LETTER_FINALS.get(last, "")
    return None


def speech_levels(morphemes: Sequence[Morpheme]) -> set[str]:
    """Return the speech levels of a text's sentence endings, quotations left out.

    ``formal`` 합니다, ``polite`` 해요, ``plain`` 한다, ``intimate`` 해; other endings say nothing.
    """
    levels, quoted = set(), 0
    for morpheme in morphemes:
        if morpheme.tag == "SSO":
            quoted += 1
        elif morpheme.tag == "SSC":
            quoted = max(0, quoted - 1)
        elif morpheme.tag == "EF" and not quoted and (level := _level(morpheme.form)):
            levels.add(level)
    return levels


def _level(ending: str) -> str | None:
    if ending.endswith(_FORMAL):
        return "formal"
    if ending.endswith(("요", "죠")):
        return "polite"
    if ending.endswith("다"):
        return "plain"
    return "intimate" if ending.endswith(_INTIMATE) else None
