import pytest
from report_runs import full_run


@pytest.fixture
def run(tmp_path):
    return full_run(tmp_path / "small-run")
