import pytest

from soju.core.results import Interval
from soju.report.tables import format_difference, format_duration, format_interval, format_p, format_value, is_cost


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8421, "fraction", "0.842"),
        (-0.0001, "fraction", "0.000"),
        (-0.25, "fraction", "−0.250"),
        (34.56, "points", "34.6"),
        (1_900_000, "bytes", "1.9 MB"),
        (999, "bytes", "999 B"),
        (999_999, "bytes", "1.0 MB"),
        (471_000_000, "bytes", "471 MB"),
        (0.42, "milliseconds", "0.42 ms"),
        (1500, "milliseconds", "1.50 s"),
        (0.0042, "milliseconds", "4.20 µs"),
        (0, "milliseconds", "0 ms"),
        (133, "seconds", "2 min 13 s"),
        (24_300_000, "parameters", "24.3 M"),
        (12.34, "terms", "12.3"),
        (1200, "terms", "1,200"),
        (9_876.5, "tokens per second", "9,876"),
        (0.0012, "nats", "0.0012"),
    ],
)
def test_a_value_is_written_for_a_reader(value, unit, text):
    assert format_value(value, unit) == text


def test_a_difference_shows_its_sign():
    assert format_difference(0.25, "fraction") == "+0.250"
    assert format_difference(-0.25, "fraction") == "−0.250"
    assert format_difference(0.0, "fraction") == "0.000"


def test_an_interval_with_a_negative_end_uses_a_word():
    assert format_interval(Interval(0.1, 0.2), "fraction") == "0.100–0.200"
    assert format_interval(Interval(-0.1, 0.2), "fraction") == "−0.100 to 0.200"


def test_small_p_values_are_bounds():
    assert format_p(0.0004) == "< 0.001"
    assert format_p(0.05) == "0.050"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.7, "1 min 0 s"), (3600, "1 h 0 min"), (7260, "2 h 1 min")]
)
def test_durations_use_two_units(seconds, text):
    assert format_duration(seconds) == text


def test_time_size_and_terms_are_costs_and_quality_is_not():
    assert all(map(is_cost, ["bytes", "milliseconds", "terms", "queries per second", "parameters"]))
    assert not any(map(is_cost, ["fraction", "points", "correlation", "ratio"]))
