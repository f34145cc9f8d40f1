"""soju distils large multilingual language models into small Korean–English ones."""

__version__ = "0.1.0"
