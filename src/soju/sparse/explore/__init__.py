"""A page on this machine that shows what a model makes of a text. It computes nothing: functions are passed in."""

from importlib.util import find_spec

from soju.core.errors import MissingExtraError

if not all(find_spec(package) for package in ("starlette", "uvicorn")):
    raise MissingExtraError("soju explore", "explore")
