"""How calls of torch functions become nodes of a graph: a handler for each function, by its name.

A handler is called with the builder and the call. It appends nodes, or only changes the view, and returns the view of
the result; ``GraphBuilder.refuse`` says why a call is not supported.
"""

from __future__ import annotations

from repvgg.engine.handlers import arithmetic, layers, order, products, spatial

HANDLERS = arithmetic.HANDLERS | layers.HANDLERS | order.HANDLERS | products.HANDLERS | spatial.HANDLERS

__all__ = ["HANDLERS"]
