"""Settings for every test: property tests without deadlines, because the machine may be shared; in CI no silent skips.

Their examples are the same every time, so that a failure is a regression; ``--hypothesis-profile=explore`` draws new
ones.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same-every-time", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("same-every-time")

_missing: set[str] = set()


def pytest_runtest_logreport(report):
    """Note what a skipped test lacked; see `fixtures.needs`."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if reason.startswith("Skipped: needs "):
        _missing.add(reason.removeprefix("Skipped: "))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail a run that must skip nothing (``SOJU_TESTS_NEED_ALL=1``, as in CI) when something was missing."""
    if _missing and os.environ.get("SOJU_TESTS_NEED_ALL") and not hasattr(session.config, "workerinput"):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    """Say what was missing."""
    if _missing and os.environ.get("SOJU_TESTS_NEED_ALL"):
        terminalreporter.section("missing, and SOJU_TESTS_NEED_ALL is set")
        for reason in sorted(_missing):
            terminalreporter.line(reason)
