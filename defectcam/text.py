"""Text files that people bring: lists of names, tables, names of labels, as any editor or spreadsheet saves them."""

from __future__ import annotations

import codecs
import reprlib
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file: UTF-8 with or without a mark (BOM), or UTF-16 with one. Every line ends in "\\n".

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such text; names file, line and remedy.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        before = text.partition("\0")[0] if "\0" in text else None
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(errors="replace")
    if before is not None:
        raise ValueError(f"{path} line {before.count(chr(10)) + 1} is no text in UTF-8: save the file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a file without blanks around them; empty ones are kept, since lines have numbers. Errors as `read_text`.

    Only line ends divide: names may hold other characters that `str.splitlines` divides at.
    """
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def printable(text: str) -> str:
    """At most 100 characters of a text, none that a log or CVAT's database refuses (NUL, surrogates)."""
    return "".join(character for character in text[:100] if character.isprintable())


def shortened(value: object) -> str:
    """repr(value) in at most 80 characters, whatever the value and however long."""
    if isinstance(value, (bytes, bytearray)):
        value = value[:80]  # the repr of a whole body would be four times its size
    try:
        text = reprlib.repr(value)
    except Exception:  # repr() refuses integers of more than 4300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
