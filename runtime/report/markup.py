"""HTML and SVG as text, escaped where it came from data."""

from html import escape


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element; children that are no ``Markup`` are escaped.

    Args:
        tag: its name.
        children: text or elements.
        attributes: ``class_`` stands for ``class`` and underscores for dashes; None leaves one out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    content = "".join(
        child if isinstance(child, Markup) else escape(child, quote=False) for child in children
    )
    return Markup(f"<{tag}{given}>{content}</{tag}>")


def figure(
    name: str, title: str, description: str, width: float, height: float, *shapes: Markup
) -> Markup:
    """An SVG picture that says what it shows to those who cannot see it.

    Args:
        name: unique on the page; the prefix of ids.
        title: what is shown.
        description: what there is to see.
        width: of the drawing, in its own units, as the height.
        height: see ``width``.
        shapes: what is drawn.
    """
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *shapes,
        id=name,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
