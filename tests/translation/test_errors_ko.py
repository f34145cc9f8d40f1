from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from soju.core.errors import UserError
from soju.translation.errors_ko import (
    KINDS,
    analyse_errors,
    check_particles,
    final_consonant,
    is_loop,
    kiwi_analyser,
    lost_numbers,
    spacing_counts,
    speech_levels,
)

SAMPLES = Path(__file__).parents[2] / "src" / "soju" / "samples" / "passages.heldout.jsonl"
REFERENCE = "나는 어제 서울에서 친구를 만났다."
SOURCE = "I met a friend in Seoul yesterday."


def into_korean(hypothesis, *, reference=REFERENCE, source=SOURCE):
    report = analyse_errors([hypothesis], [reference], [source], target="ko", analyse=kiwi_analyser())
    return {kind for kind, places in report.places.items() if places}


def into_english(hypothesis, *, reference="We met Minsu in Seoul.", source="우리는 서울에서 민수를 만났다."):
    report = analyse_errors([hypothesis], [reference], [source], target="en")
    return {kind for kind, places in report.places.items() if places}


def test_a_good_translation_has_no_error():
    assert into_korean(REFERENCE) == set()
    assert into_korean("어제 서울에서 친구를 만났다.") == set()
    assert into_english("In Seoul we met Minsu.") == set()


def test_empty_and_only_that():
    assert into_korean("  ") == {"empty"}
    assert into_korean("", reference="") == set()


def test_the_source_handed_back_is_copied():
    assert {"copied", "untranslated"} <= into_korean(SOURCE)
    assert into_korean("PyTorch", reference="PyTorch", source="PyTorch") == set()


def test_letters_of_the_source_are_untranslated_unless_the_reference_has_them():
    assert "untranslated" in into_korean("나는 met a friend yesterday 서울.")
    same = "Python 코드를 GitHub 저장소에 올렸다."
    assert into_korean(same, reference=same, source="I pushed the Python code to a GitHub repository.") == set()
    assert "untranslated" in into_english("We met 민수를 서울에서.")


def test_words_or_characters_in_a_row_are_a_loop():
    assert is_loop("나는 나는 나는 갔다", "나는 갔다")
    assert is_loop("안녕하세요 반갑습니다 안녕하세요 반갑습니다 안녕하세요 반갑습니다", "안녕하세요")
    assert is_loop("수도권도권도권도권", "수도권")
    assert not is_loop("매우 매우 좋다", "아주 좋다")
    assert not is_loop("하하하하하하하하", "하하하하하하하하")
    assert "repeated" in into_korean("나는 어제 어제 어제 서울에서 친구를 만났다.")


def test_length_outside_the_ratio_is_told_by_direction():
    assert "too_short" in into_korean("만났다.")
    assert "too_long" in into_korean(
        " ".join([REFERENCE, "그리고 함께 저녁을 먹고 영화를 본 다음 늦게 집에 돌아왔다."])
    )
    assert into_korean("네", reference="그래", source="yes") == set()  # few characters prove nothing


def test_numbers_are_lost_when_source_and_reference_have_them():
    assert lost_numbers("1000명이 왔다", "1,000명이 왔다", "1,000 people came") == []
    assert lost_numbers("100명이 왔다", "1,000명이 왔다", "1,000 people came") == ["1000"]
    assert lost_numbers("세 명이 3.5미터", "3명이 3.5미터", "three people, 3.5 metres") == []
    assert lost_numbers("2와", "2와 2", "2 and 2") == ["2"]
    assert "lost_number" in into_korean("5시에 간다", reference="7시에 간다", source="I leave at 7")


def test_names_are_lost():
    assert into_english("We met him in Seoul.") == {"lost_name"}
    assert into_english("we MET MINSU IN SEOUL.") == set()
    assert "lost_name" in into_korean("나는 어제 부산에서 친구를 만났다.")
    assert "lost_name" in into_korean(
        "코드를 올렸다.", reference="Python 코드를 올렸다.", source="I pushed Python code."
    )


def test_placeholders_must_stand_as_often_as_in_the_source():
    texts = {"reference": "__p1__에서 __p2__를 열어라.", "source": "Open __p2__ in __p1__."}
    assert into_korean("__p1__에서 __p2__를 열어라.", **texts) == set()
    assert "lost_placeholder" in into_korean("__p1__에서 파일을 열어라.", **texts)
    assert "lost_placeholder" in into_korean("__p1__에서 __p2__를 __p2__를 열어라.", **texts)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("나는 학교에 갔다", "나는 학교에 갔다", (2, 0, 0)),
        ("나는학교에 갔다", "나는 학교에 갔다", (1, 0, 1)),
        ("나 는 학교에 갔다", "나는 학교에 갔다", (2, 1, 0)),
        ("나는 집에 갔다", "나는 학교에 갔다", (1, 0, 0)),  # 는·집 and 는·학 are no common pair
        ("가나 가나", "가나가나 가나", (1, 0, 0)),
        ("", "나는 간다", (0, 0, 0)),
    ],
)
def test_spaces_are_compared_between_common_neighbours(hypothesis, reference, expected):
    assert spacing_counts(hypothesis, reference) == expected


def test_spacing_f1_is_that_of_all_sentences_together():
    pair = ["나는학교에 갔다", "나는 학교에 갔다"]
    report = analyse_errors(*[[text] * 2 for text in (*pair, "I went to school")], target="ko")
    assert report.spacing_f1 == pytest.approx(2 * 2 / (2 * 2 + 0 + 2))
    assert analyse_errors(["a b"], ["a b"], ["가"], target="en").spacing_f1 is None


@pytest.mark.parametrize(
    ("stem", "final"),
    [
        *(
            ("학교", ""),
            ("책", "ㅇ"),
            ("서울", "ㄹ"),
            ("3", "ㅁ"),
            ("2", ""),
            ("7", "ㄹ"),
            ("10", "ㅇ"),
            ("1,000", "ㅇ"),
        ),
        *(("IBM", "ㅁ"), ("CPU", ""), ("HTML", "ㄹ"), ("Python", None), ("PyTorch", None), ("", None), ("(", None)),
    ],
)
def test_the_last_consonant_is_that_of_the_word_as_it_is_read(stem, final):
    assert final_consonant(stem) == final


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("책은 사과는 책이 사과가 책을 사과를 책과 사과와 집으로 학교로 서울로", []),
        ("사과을 먹었다.", ["사과을"]),
        ("책를 읽는 학생은 친구과 갔다.", ["책를", "친구과"]),
        ("집로 가지요", ["집로"]),
        ("물으로 씻자", ["물으로"]),
        ("고양이은 귀엽고 학교이 크다", ["고양이은", "학교이"]),
        ("집에서은 쉬고 서울에서는 일한다", ["집에서은"]),
        ("‘세종’는 왕이다", ["‘세종’는"]),
        ("7으로 나누고 10로 곱한 뒤 2을 더했다", ["7으로", "10로", "2을"]),
        ("IBM가 만든 CPU이 왔다", ["IBM가", "CPU이"]),
        ("먹는 밥과 가는 길, 작은 집", []),  # verbal endings look like particles and are none
        ("Python은 좋고 Python는 빠르다", []),  # how it is read is not written
    ],
)
def test_particles_take_the_form_that_the_last_consonant_asks_for(text, wrong):
    particles = check_particles(text, kiwi_analyser()(text))
    assert [particle.word for particle in particles if not particle.right] == wrong


def test_every_particle_of_the_list_is_judged():
    text = "책은 사과는 책이 사과가 책을 사과를 책과 사과와 집으로 학교로 서울로"
    assert len(check_particles(text, kiwi_analyser()(text))) == 11


def korean_samples():
    return [json.loads(line)["ko"] for line in SAMPLES.read_text(encoding="utf-8").splitlines()][:60]


def test_particles_of_our_own_passages_are_right_and_wrong_ones_are_found():
    """Precision and recall on real text: nearly no false alarm, and most particles that are swapped are found."""
    other = {"은": "는", "는": "은", "을": "를", "를": "을", "과": "와", "와": "과"}
    analyse = kiwi_analyser()
    judged = false_alarms = swapped = found = 0
    for text in korean_samples():
        particles = check_particles(text, analyse(text))
        judged += len(particles)
        false_alarms += sum(not particle.right for particle in particles)
        for particle in particles[:2]:
            if particle.particle not in other or text.count(particle.word) > 1:
                continue
            wrong = particle.word[:-1] + other[particle.particle]
            spoilt = re.sub(rf"{re.escape(particle.word)}(?!\w)", wrong, text, count=1)
            if spoilt != text:
                swapped += 1
                found += any(p.word == wrong and not p.right for p in check_particles(spoilt, analyse(spoilt)))
    assert judged > 200
    assert false_alarms <= 0.01 * judged
    assert swapped > 30
    assert found >= 0.8 * swapped


def test_a_wrong_particle_is_reported_unless_the_reference_writes_it_too():
    assert "wrong_particle" in into_korean("나는 어제 서울에서 친구을 만났다.")
    assert "wrong_particle" not in into_korean("친구을 만났다고 한다.", reference="친구을 만났다고 한다.")


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("밥을 먹습니다. 잠을 잡니까?", {"formal"}),
        ("밥을 먹어요. 잠을 자죠.", {"polite"}),
        ("밥을 먹는다. 잠을 잤다.", {"plain"}),
        ("밥 먹었어? 갔지.", {"intimate"}),
        ("밥을 먹어요. 그리고 잤습니다.", {"polite", "formal"}),
        ("그는 “가요”라고 말했다.", {"plain"}),
        ("서울의 밤", set()),
    ],
)
def test_speech_levels_are_those_of_the_sentence_endings(text, levels):
    assert speech_levels(kiwi_analyser()(text)) == levels


def test_levels_are_mixed_when_the_reference_keeps_to_one():
    one, two = "집에 갔습니다. 밥을 먹었습니다.", "집에 갔습니다. 밥을 먹었어요."
    source = "I went home. I ate."
    assert "mixed_levels" in into_korean(two, reference=one, source=source)
    assert "mixed_levels" not in into_korean(two, reference=two, source=source)
    assert "mixed_levels" not in into_korean(one, reference=one, source=source)


def test_the_report_counts_sentences_by_kind():
    report = analyse_errors(
        ["", REFERENCE, "친구을 만났다."], [REFERENCE] * 3, [SOURCE] * 3, target="ko", analyse=kiwi_analyser()
    )
    assert report.places["empty"] == [0]
    assert report.places["wrong_particle"] == [2]
    assert report.rate("empty") == pytest.approx(1 / 3)
    assert set(report.places) == set(KINDS)
    assert json.loads(json.dumps(report.to_json()))["errors"]["empty"] == {"count": 1, "rate": pytest.approx(1 / 3)}


def test_without_an_analyser_what_needs_one_is_absent_and_not_0():
    report = analyse_errors([REFERENCE], [REFERENCE], [SOURCE], target="ko")
    assert "wrong_particle" not in report.places
    assert "mixed_levels" not in report.places
    assert report.particles_judged == 0


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(UserError, match="give one each"):
        analyse_errors(["a"], ["a", "b"], ["a"], target="en")


@pytest.mark.parametrize("text", ["가", "가 ", "1,000 ", "__p1__", "Ab "])
def test_the_cost_is_linear_in_the_text(text):
    def seconds(count):
        best = []
        for _ in range(2):
            start = time.process_time()
            analyse_errors([text * count], [text * count], [text * count], target="en")
            best.append(time.process_time() - start)
        return min(best)

    assert seconds(8_000) < 3.5 * seconds(4_000) + 0.05
