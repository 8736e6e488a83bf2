"""Blocks of a text between two comments, which a command writes anew."""

import re


def inserted(text: str, name: str, block: str) -> str:
    """The text with the block between the comments of that name; ValueError where there is no pair of them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"it needs one {start}, and one {end} after it")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{block}\n{end}", text, flags=re.S)
