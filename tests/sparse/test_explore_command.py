"""``soju explore`` at the command line: start, question, Ctrl-C, taken port, missing package."""

import json
import os
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from soju.cli import app
from soju.core.errors import MissingExtraError, UserError
from soju.sparse.explore import listen


@pytest.mark.slow
def test_it_prints_its_address_answers_and_ends_with_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "soju", "explore", "ko-en-static", "--port", "0", "--no-browser"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        address, _, rest = process.stdout.readline().partition(" ")
        assert rest == "shows ko-en-static; Ctrl-C ends it\n", process.stderr.read() if process.poll() else rest
        assert address.startswith("http://127.0.0.1:")
        with urlopen(f"{address}api/expand?q=%EB%AC%BC", timeout=60) as answer:  # 물
            assert json.load(answer)["models"][0]["terms"][0]["term"] == "물"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "Ended.\n", "")


def test_a_taken_port_is_told_before_models_load():
    taken = listen(0)
    try:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["explore", "nowhere", "--port", port])
    finally:
        taken.close()
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"port {port}: ")


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_the_line_that_installs_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, ["explore", "nowhere"])
    assert isinstance(result.exception, MissingExtraError)
    assert "run: pip install 'soju[explore]'" in str(result.exception)
