"""A local web page that shows what a model makes of a text. Computes nothing: functions are passed in."""

from soju.core.errors import MissingExtraError

try:
    import starlette
    import uvicorn
except ImportError:
    raise MissingExtraError("soju explore", "explore") from None

__all__ = ["starlette", "uvicorn"]
