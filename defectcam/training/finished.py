"""The parts of photos that a person has labelled to the end: finished.csv of a data set.

A photo of 25 megapixels is rarely finished whole. Outside of its finished boxes nothing is known: neither that there is a
defect nor that there is none.
"""

from __future__ import annotations

from pathlib import Path

from defectcam.training.names import PhotoNames
from defectcam.training.tables import number_of, table_rows

FINISHED = "finished.csv"
SIDES = ("x0", "y0", "x1", "y1")

Box = tuple[int, int, int, int]


def read_finished(path: Path, names: PhotoNames) -> dict[str, list[tuple[int, Box]]]:
    """Stem of each photo that is listed -> (line, box) of its finished parts; {} where there is no such file.

    A box is x0, y0, x1, y1 in px of the upright photo, x1 and y1 exclusive. Whether it ends in the photo is not checked.

    Raises:
        ValueError: naming the line with a box that is empty or begins outside of the photo, or a photo that is not there.
    """
    if not path.exists():
        return {}
    rows, decimal_comma = table_rows(path, ("photo", *SIDES), "finished parts")
    found: dict[str, list[tuple[int, Box]]] = {}
    for line, row in rows:
        try:
            name = row["photo"].strip()
            stem = names.find(name)
            sides = [number_of(row[side], decimal_comma) for side in SIDES]
            if stem is None:
                raise ValueError(f"there is no photo {name!r} in {path.parent / 'images'}")
            if not all(side.is_integer() for side in sides):
                raise ValueError(f"{sides} are no whole pixels of the upright photo")
            x0, y0, x1, y1 = map(int, sides)
            if x0 < 0 or y0 < 0:
                raise ValueError(f"the box {(x0, y0, x1, y1)} leaves the photo {name}")
            if x1 <= x0 or y1 <= y0:
                raise ValueError(f"the box {(x0, y0, x1, y1)} of {name} is empty: x1 and y1 must be larger than x0 and y0")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            what = error if isinstance(error, ValueError) else f"{error!r}; photo, x0, y0, x1 and y1 are needed"
            raise ValueError(f"{path} line {line}: {what}") from None
        found.setdefault(stem, []).append((line, (x0, y0, x1, y1)))
    return found
