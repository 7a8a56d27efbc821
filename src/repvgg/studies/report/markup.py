"""HTML and SVG elements as text that cannot be escaped wrongly.

:func:`element` escapes every ``str`` and lets only :class:`Markup` through, and only :func:`element` makes Markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_VOID = frozenset({"br", "col", "hr", "img", "link", "meta", "wbr"})
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable[Markup] | None
Attribute = str | float | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Markup:
    """One element: ``element("p", "a < b", class_="note")`` is ``<p class="note">a &lt; b</p>``.

    Args:
        tag: name of the element.
        *children: text (escaped), Markup (as it is), iterables of Markup, or None (nothing).
        **attributes: a trailing ``_`` is dropped and ``_`` inside becomes ``-``; None leaves the attribute out.
    """
    opening = f"<{tag}{''.join(_attribute(name, value) for name, value in attributes.items() if value is not None)}>"
    if tag in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """All children one after the other, escaped where they are plain text."""
    return Markup("".join(map(_child, children)))


def breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots."""
    first, *others = name.split(".")
    return join(first, (join(".", element("wbr"), part) for part in others))


def stylesheet(css: str) -> Markup:
    """A ``<style>`` element. Style sheets are not escaped in HTML: ``css`` is a resource of ours, never input."""
    return Markup(f"<style>\n{css}</style>")


def number(value: float) -> str:
    """A coordinate with at most two decimals: ``12``, ``0.5``."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent(value: float) -> str:
    """A relative coordinate: ``12.5%``."""
    return f"{number(value)}%"


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escape(_NOT_IN_XML.sub("\ufffd", child))
    return "".join(child)


def _attribute(name: str, value: Attribute) -> str:
    text = value if isinstance(value, str) else number(value or 0)
    return f' {name.rstrip("_").replace("_", "-")}="{escape(_NOT_IN_XML.sub(chr(0xFFFD), text))}"'
