"""``python -m cortexlab`` is the command line."""

from .cli.main import entry

entry()
