import random

import numpy as np
import pytest

from soju.evaluation.translation import QualityWeights, SentenceStatistics, english_tokens, measure
from soju.evaluation.translation_bootstrap import derangement, retention
from soju.translation.config import GateSettings
from soju.translation.gate import TranslationGate, WeakTeacherError
from soju.translation.toy import toy_pairs

PAIRS = toy_pairs(400, seed=9)
REFERENCES = [pair.en for pair in PAIRS]
DOMAINS = [pair.domain for pair in PAIRS]
WORDS = sorted({word for text in REFERENCES for word in text.split()})


def spoilt(share, seed=0):
    """References in which a share of the words are others."""
    drawn = random.Random(seed)
    return [
        " ".join(drawn.choice(WORDS) if drawn.random() < share else word for word in text.split())
        for text in REFERENCES
    ]


def counted(hypotheses):
    return measure(hypotheses, REFERENCES, english_tokens())


TEACHER = spoilt(0.1)
CHANCE = counted([TEACHER[place] for place in derangement(DOMAINS)])


def gate(teacher=TEACHER, **settings):
    hypotheses = list(teacher)
    chance = counted([hypotheses[place] for place in derangement(DOMAINS)])
    sides = ({"ko-en": counted(hypotheses)}, {"ko-en": chance})
    return TranslationGate(GateSettings(**settings), *sides, DOMAINS, QualityWeights(), draws=400)


def test_the_teacher_itself_passes_and_a_spoilt_one_fails():
    verdict = gate().judge("copy", {"ko-en": counted(TEACHER)})
    assert verdict.passed
    assert verdict.meaningful
    assert verdict.directions["ko-en"].retention.value == pytest.approx(1.0)
    worse = gate().judge("worse", {"ko-en": counted(spoilt(0.3))})
    assert not worse.passed
    assert "worse, ko-en: retention 0." in worse.reasons[0]


def test_the_lower_bound_decides_and_not_the_estimate():
    """A student whose estimate is above the threshold and whose bound is not."""
    student = counted(spoilt(0.13, seed=2))
    found = retention(student, counted(TEACHER), CHANCE, draws=400)
    between = (found.value + found.low) / 2
    assert found.low < between < found.value
    assert not gate(retention=between).judge("close", {"ko-en": student}).passed
    assert gate(retention=found.low - 0.01).judge("close", {"ko-en": student}).passed


def test_chance_has_no_retention():
    verdict = gate().judge("chance", {"ko-en": CHANCE})
    assert verdict.directions["ko-en"].retention.value == pytest.approx(0.0)


def test_a_missing_direction_and_another_signature_fail():
    assert gate().judge("none", {}).reasons[0] == "none, ko-en: not measured"
    good = counted(TEACHER)
    other = SentenceStatistics(good.counts_NK, {}, "measured otherwise")
    assert "not measured alike" in gate().judge("other", {"ko-en": other}).reasons[0]


def test_a_domain_that_lies_below_as_a_whole_fails_and_a_doubtful_one_is_named():
    bad = spoilt(0.6, seed=5)
    student = [bad[place] if DOMAINS[place] == "things" else TEACHER[place] for place in range(len(PAIRS))]
    count = DOMAINS.count("things")
    few = gate(retention=0.5, domain_pairs=min(count, 400 - count)).judge("uneven", {"ko-en": counted(student)})
    states = {domain: one.state for domain, one in few.domains["ko-en"].items()}
    assert states == {"things": "failed", "places": "passed"}
    assert few.directions["ko-en"].state == "passed"
    assert not few.passed
    found = few.domains["ko-en"]["things"].retention
    doubtful = gate(retention=(found.low + found.high) / 2, domain_pairs=min(count, 400 - count))
    assert doubtful.judge("doubtful", {"ko-en": counted(student)}).domains["ko-en"]["things"].state == "unproven"


def test_a_weak_teacher_is_refused_or_stamped():
    babble = spoilt(1.0)
    with pytest.raises(WeakTeacherError, match="needed for retention to mean anything") as error:
        gate(babble).judge("student", {"ko-en": counted(babble)})
    assert error.value.exit_code == 2
    verdict = gate(babble, allow_weak_teacher=True).judge("student", {"ko-en": counted(babble)})
    assert not verdict.meaningful
    assert verdict.to_json()["meaningful"] is False


def test_no_sentence_keeps_its_own_translation_in_chance():
    moved = derangement(DOMAINS)
    assert not (moved == np.arange(len(moved))).any()
    assert [DOMAINS[place] for place in moved] == DOMAINS
