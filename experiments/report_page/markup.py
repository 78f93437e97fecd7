"""HTML made of elements: every text is escaped and every tag closed, by construction."""

import html
import re

# Not allowed in HTML, or in UTF-8; a file's name may hold any of them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"img", "input", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | bool) -> Markup:
    """One element with what is in it.

    Args:
      name: Of the element.
      children: In their order; what is not Markup is text and escaped.
      attributes: Their names with _ for -, and with one _ more at the end where Python has a use
        for the name itself. True stands for an attribute without a value, False for none.
    """
    opened = [name]
    for key, value in attributes.items():
        if value is not False:
            key = key.rstrip("_").replace("_", "-")
            opened.append(key if value is True else f'{key}="{_escaped(str(value))}"')
    if name in _VOID:
        return Markup(f"<{' '.join(opened)}>")
    return Markup(f"<{' '.join(opened)}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Several pieces, one after the other; what is not Markup is text and escaped."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def _escaped(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text))
