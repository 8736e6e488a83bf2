"""Replaces the part of a text between two marker comments, which a command generates."""

import re


def inserted(text: str, name: str, block: str) -> str:
    """Return the text with `block` between the comments of this name. Raise ValueError if there aren't two of them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the text must contain {start} once, and {end} once after it")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{block}\n{end}", text, flags=re.S)
