"""Tables as people save them: CSV of any spreadsheet, or a JSON object a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from defectcam.text import read_text

DELIMITERS = (",", ";", "\t")  # of CSV


def table_rows(path: Path, needed: Sequence[str], what: str) -> tuple[Iterable[tuple[int, dict]], bool]:
    """Line numbers and rows of a table, with small letters in their keys; and whether commas may be decimal.

    The table is CSV, or JSONL by the file's ending. CSV has commas, semicolons or tabs between. For
    encodings see `read_text`.

    Args:
        needed: names of the columns that it must have.
        what: it holds, in the words of a message.

    Raises:
        FileNotFoundError: it cannot be read.
        ValueError: it is no text, or its header lacks a column.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the {what} {path}: {error.strerror}") from None
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text, needed), False
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=(delimiter := _delimiter(text)))
    header = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in needed if name not in header]:
        raise ValueError(
            f"{path} line 1 has the columns {', '.join(header)}, but not {', '.join(missing)}: it must name "
            f"{_listed(needed)}, with commas, semicolons or tabs between"
        )
    return _csv_rows(path, reader, header), delimiter != ","


def _delimiter(text: str) -> str:
    """What stands between the columns' names in the first line."""
    header = text.partition("\n")[0]
    return max(DELIMITERS, key=header.count)


def _csv_rows(path: Path, reader: Iterator[list[str]], header: list[str]) -> Iterator[tuple[int, dict]]:
    for fields in reader:
        if not any(map(str.strip, fields)):
            continue
        if any(map(str.strip, fields[len(header) :])):
            raise ValueError(
                f"{path} line {reader.line_num} has {len(fields)} fields, its header {len(header)}: with decimal commas put "
                "semicolons between the fields, or write points"
            )
        yield reader.line_num, dict(zip(header, fields))


def _json_rows(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, {key.strip().lower(): value for key, value in json.loads(line).items()}
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path} line {number}: {error}; a JSON object with {_listed(needed)} needed") from None


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def number_of(value: object, decimal_comma: bool) -> float:
    """The number in a field of a table; ValueError or TypeError where it is none."""
    return float(value.replace(",", ".") if decimal_comma and isinstance(value, str) else value)
