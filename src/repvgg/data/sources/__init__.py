"""One file a kind of source; :func:`open_source` finds the one that a URI asks for."""

from repvgg.data.sources.table import agree, open_source

__all__ = ["agree", "open_source"]
