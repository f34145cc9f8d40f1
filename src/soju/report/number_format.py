"""Numbers as a reader sees them: values in their unit, differences, intervals, p-values, durations."""

from __future__ import annotations

import math

from soju.core.score import Interval

_SECONDS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6}
_COST_WORDS = ("bytes", "terms", "tokens", "parameters", "documents", "postings", "flops", "products", "bits")
_HEADINGS = {"fraction": "0–1", "correlation": "−1–1", "percent": "%"}
_SCALED = {"bytes", "parameters", *_SECONDS}


def is_cost(unit: str) -> bool:
    """Tell whether a unit measures what a system costs (time, size, terms) rather than how good it is."""
    return unit in _SECONDS or unit.startswith(_COST_WORDS) or unit.endswith(("per second", "/s", "/second"))


def unit_heading(unit: str) -> str:
    """Return what a column's head says about its unit; nothing when every value carries its own."""
    return "" if unit in _SCALED else _HEADINGS.get(unit, unit)


def format_value(value: float, unit: str) -> str:
    """Write a value in its unit: three decimals for a fraction, otherwise about three digits.

    >>> format_value(1_900_000, "bytes"), format_value(0.42, "milliseconds"), format_value(0.8421, "fraction")
    ('1.9 MB', '0.42 ms', '0.842')
    """
    if value < 0:
        text = format_value(-value, unit)
        return f"−{text}" if any(digit in text for digit in "123456789") else text
    if unit == "bytes":
        return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"))
    if unit == "parameters":
        return _scaled(value, 1000, ("", "k", "M", "B", "T"))
    if unit in _SECONDS:
        return _time(value * _SECONDS[unit], unit)
    if unit in ("fraction", "correlation"):
        return f"{value:.3f}"
    if unit in ("points", "percent"):
        return f"{value:.1f}"
    return _digits(value)


def format_difference(value: float, unit: str) -> str:
    """Write a difference with its sign."""
    text = format_value(value, unit)
    return f"+{text}" if value > 0 and any(digit in text for digit in "123456789") else text


def format_interval(interval: Interval, unit: str) -> str:
    """Write both ends of an interval."""
    dash = " to " if interval.low < 0 else "–"
    return f"{format_value(interval.low, unit)}{dash}{format_value(interval.high, unit)}"


def format_level(interval: Interval) -> str:
    """Write the level of an interval, ``95 %``, on one line."""
    return f"{interval.level * 100:g}\u00a0%"


def format_p(p_value: float) -> str:
    """Write a p-value to three decimals, and a smaller one as a bound."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def format_weight(weight: float) -> str:
    """Write a term's weight to two decimals."""
    return f"{weight:.2f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Write how long something took.

    >>> format_duration(0.84), format_duration(133), format_duration(7260)
    ('0.8 s', '2 min 13 s', '2 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _digits(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    if value >= 100:
        return f"{value:,.0f}"
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:.{2 - max(math.floor(math.log10(value)), 0)}f}"


def _scaled(value: float, step: int, suffixes: tuple[str, ...]) -> str:
    index = 0
    while index < len(suffixes) - 1 and round(value, 0 if index == 0 else 1) >= step:
        value /= step
        index += 1
    text = f"{value:,.0f}" if index == 0 or value >= 100 else f"{value:.1f}"
    return f"{text} {suffixes[index]}".rstrip()


def _time(seconds: float, unit: str) -> str:
    if seconds == 0:
        return f"0 {'s' if unit == 'seconds' else 'ms' if unit == 'milliseconds' else 'µs'}"
    if seconds >= 120:
        return format_duration(seconds)
    if seconds >= 1:
        return f"{_digits(seconds)} s"
    if seconds >= 1e-5:
        return f"{_digits(float(f'{seconds * 1e3:.6g}'))} ms"
    return f"{_digits(float(f'{seconds * 1e6:.6g}'))} µs"
