"""The public names, what importing them loads, and the examples in docstrings."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import soju.speculative_kd


@pytest.mark.parametrize(
    "code",
    [
        "import soju.speculative_kd",
        "from soju.speculative_kd import RolloutSettings, DivergenceSettings; RolloutSettings()",
    ],
)
def test_settings_load_no_torch(code):
    subprocess.run([sys.executable, "-c", f"import sys; {code}; assert 'torch' not in sys.modules"], check=True)


def test_every_public_name_is_there():
    for name in soju.speculative_kd.__all__:
        assert getattr(soju.speculative_kd, name).__name__ == name
    assert dir(soju.speculative_kd) == sorted(soju.speculative_kd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = soju.speculative_kd.Unknown


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(soju.speculative_kd.__path__)])
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"soju.speculative_kd.{module}"))
    assert found.failed == 0
    assert module != "rollout" or found.attempted > 0
