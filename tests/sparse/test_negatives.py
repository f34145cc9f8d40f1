import pytest
from pydantic import ValidationError

from soju.data.rows import PairRow, PassageRow, Term, TermRow, TripletRow
from soju.sparse.negatives import (
    Answers,
    Candidate,
    Choice,
    Negative,
    Question,
    RelatedTerms,
    Text,
    choose,
    distinct,
    pair_type_of,
    questions_of,
)

QUERY = Question("물을 끓인다", "Boil the water in a pot.", "cross_lingual")
NO_FILTER = Choice(relative=None)


def candidates(*pairs):
    return [Candidate(Text.of(text), score) for text, score in pairs]


FOUND = candidates(
    ("Boil the water, in a pot!", 10.0),  # the positive but for signs
    ("Water boils in the pot.", 9.6),
    ("Boil the eggs.", 9.5),
    ("Pour the water.", 4.0),
    ("물을 끓인다.", 3.0),  # the query but for signs
    ("Wash the pot.", 2.0),
)


def chosen(choice, *, found=FOUND, question=QUERY, guard=None, positive_score=10.0, known=None):
    return choose(question, found, known or {}, guard or RelatedTerms(), choice, positive_score=positive_score)


def test_the_best_that_scores_at_most_the_share_of_the_positive_is_taken():
    result = chosen(Choice(relative=0.95))
    assert result.negatives == [Negative("Boil the eggs.", 2, 9.5)]  # 9.5 = 0.95 * 10 passes, 9.6 does not
    assert result.dropped == {"known positive": 1, "too close to the positive": 1, "the query itself": 1}


def test_an_absolute_bound_holds_as_well():
    result = chosen(Choice(max_score=4.0))
    assert [negative.text for negative in result.negatives] == ["Pour the water."]
    assert result.dropped["above the highest score"] == 2


def test_ranks_count_from_one_without_what_answers_or_asks():
    negatives = chosen(Choice(relative=None, per_query=9)).negatives
    assert [(negative.text, negative.rank) for negative in negatives] == [
        ("Water boils in the pot.", 1),
        ("Boil the eggs.", 2),
        ("Pour the water.", 3),
        ("Wash the pot.", 4),
    ]


def test_skipped_ranks_are_left_out_and_counted():
    result = chosen(Choice(relative=None, skip=2))
    assert [negative.rank for negative in result.negatives] == [3]
    assert result.dropped["skipped rank"] == 2


def test_other_positives_of_the_query_are_no_negatives():
    rows = [QUERY, Question("물을 끓인다!", "Water boils in the pot", "cross_lingual")]
    known = Answers(rows).of(Text.of(QUERY.query))
    assert chosen(NO_FILTER, known=known).negatives[0].text == "Boil the eggs."


def test_answers_hold_in_both_directions():
    answers = Answers([Question("병원", "hospital", "single_term", other_positives=("의원",))])
    assert set(answers.of(Text.of("병원"))) == {"hospital", "의원"}
    assert set(answers.of(Text.of("Hospital"))) == {"병원"}
    assert answers.of(Text.of("약국")) == {}


@pytest.mark.parametrize("score", [0.0, -0.2])
def test_a_positive_without_a_score_bounds_nothing_so_there_is_no_negative(score):
    result = chosen(Choice(), positive_score=score)
    assert result.positive_unknown
    assert result.negatives == []
    assert not chosen(NO_FILTER, positive_score=score).positive_unknown


@pytest.mark.parametrize(
    ("rank", "difficulty"), [(1, "hard"), (10, "hard"), (11, "medium"), (50, "medium"), (51, "easy")]
)
def test_difficulty_is_told_by_rank(rank, difficulty):
    assert Negative("x", rank, 0.0).difficulty == difficulty


def test_a_sample_depends_on_seed_and_question_only():
    found = candidates(*((f"Sentence number {n} about pots.", 1.0) for n in range(50)))
    draw = lambda seed, question=QUERY: [  # noqa: E731
        negative.rank
        for negative in chosen(Choice(pick="sample", per_query=5, seed=seed), found=found, question=question).negatives
    ]
    assert draw(0) == draw(0) == sorted(set(draw(0)))
    assert len({tuple(draw(seed)) for seed in range(5)}) == 5
    assert draw(0) != draw(0, Question("물을 붓는다", QUERY.positive, "cross_lingual"))


def test_sampling_prefers_no_rank():
    found = candidates(*((f"Sentence number {n} about pots.", 1.0) for n in range(10)))
    ranks = [chosen(Choice(pick="sample", seed=seed), found=found).negatives[0].rank for seed in range(1000)]
    assert all(60 <= ranks.count(rank) <= 140 for rank in range(1, 11))  # 100 expected, 4 standard deviations


TERMS = [
    TermRow("증상", (Term("symptom", 1.0), Term("indication", 0.7))),
    TermRow("징후", (Term("sign", 1.0), Term("indication", 0.8))),
    TermRow("임상증상", (Term("clinical manifestation", 1.0),)),
    TermRow("가", (Term("edge", 1.0),)),
]


@pytest.mark.parametrize(
    ("query", "candidate", "reason"),
    [
        ("임상증상", "증상", "base term or compound"),
        ("증상", "임상 증상", "base term or compound"),
        ("clinical symptom", "Symptom", "base term or compound"),
        ("증상", "징후", "shared translation"),  # both are an indication
        ("증상", "indication", "shared translation"),
        ("임상증상", "symptom", "base term or compound"),  # by its translation 증상
        ("임상증상", "병원", None),
        ("가구", "edge", None),  # its translation 가 is one syllable, which says nothing
        ("가구", "가", "base term or compound"),
        ("in", "printing", None),  # two letters
        ("증상", "임상증상이 나타나면 병원에 간다.", "holds the term"),
        ("환자가 증상을 말하고 의사가 듣는다", "증상", None),  # a sentence has words, no base terms
    ],
)
def test_related_terms_are_no_negatives(query, candidate, reason):
    assert RelatedTerms(TERMS).reason([Text.of(query)], Text.of(candidate)) == reason


def test_the_guard_looks_at_every_answer_and_its_drops_are_counted():
    question = Question("임상증상", "clinical manifestation", "single_term", other_positives=("clinical picture",))
    found = candidates(("clinical", 1.0), ("picture", 1.0), ("manifestation", 1.0), ("hospital", 1.0))
    result = chosen(Choice(), found=found, question=question, guard=RelatedTerms(TERMS), positive_score=9.0)
    assert result.negatives == [Negative("hospital", 4, 1.0)]
    assert result.dropped == {"base term or compound": 3}


@pytest.mark.parametrize("wrong", [{"per_query": 0}, {"skip": -1}, {"relative": 0.0}, {"relative": float("nan")}])
def test_settings_are_bounded(wrong):
    with pytest.raises(ValidationError):
        Choice(**wrong)


def test_a_pair_asks_in_both_directions():
    asked = list(questions_of(PairRow("물을 끓인다", "Boil the water in it"), "p.tsv"))
    assert [(q.query, q.positive, q.pair_type) for q in asked] == [
        ("물을 끓인다", "Boil the water in it", "cross_lingual"),
        ("Boil the water in it", "물을 끓인다", "cross_lingual"),
    ]
    assert [q.answer_language for q in asked] == ["en", "ko"]
    assert all(q.crosses_languages and q.source == "p.tsv" for q in asked)


def test_a_passage_is_asked_for_in_four_directions_and_its_translation_answers_too():
    row = PassageRow("p", "kitchen", "물을 냄비에 넣고 끓인다.", "Boil water in a pot.", "물 끓이기", "boiling water")
    asked = list(questions_of(row))
    assert [(q.query, q.positive) for q in asked] == [
        (query, positive) for query in (row.query_ko, row.query_en) for positive in (row.ko, row.en)
    ]
    assert [q.pair_type for q in asked] == ["monolingual", "cross_lingual", "cross_lingual", "monolingual"]
    assert asked[0].other_positives == (row.en,)


def test_a_head_word_and_its_best_english_term_ask_for_each_other():
    row = TermRow("책", (Term("도서", 1.0), Term("book", 0.9), Term("volume", 0.5)))
    assert [(q.query, q.positive, q.other_positives, q.pair_type) for q in questions_of(row)] == [
        ("책", "book", ("도서", "volume"), "single_term"),
        ("book", "책", ("도서", "volume"), "single_term"),
    ]
    assert list(questions_of(TermRow("책", (Term("도서", 1.0),)))) == []


def test_a_triplet_keeps_its_pair_type_and_loses_its_negative():
    (question,) = questions_of(TripletRow("단추", "button", "zipper", "monolingual", "easy"))
    assert question == Question("단추", "button", "monolingual")


def test_repeated_questions_are_one():
    asked = [Question("물!", "Water", "a"), Question("물", "water.", "b"), Question("물", "aqua", "c")]
    assert [q.pair_type for q in distinct(asked)] == ["a", "c"]


@pytest.mark.parametrize(
    ("query", "positive", "kind"),
    [
        ("단추", "button", "single_term"),
        ("세 단어 말", "three word term", "single_term"),
        ("단추", "a button made of horn", "cross_lingual"),
        ("물이 끓으면 불을 끈다", "불을 끄자", "monolingual"),
        ("COM", "an interface of Windows", "monolingual"),
        ("매우" * 20, "very", "cross_lingual"),  # one word, but 40 characters
    ],
)
def test_pair_types_are_told_by_language_and_length(query, positive, kind):
    assert pair_type_of(query, positive) == kind


def test_a_text_without_letters_is_compared_as_it_is():
    assert Text.of("?!").key == "?!"
