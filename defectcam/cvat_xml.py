"""The elements of a file "CVAT for images 1.1", as exports of CVAT have them."""

from __future__ import annotations

from xml.etree import ElementTree


def root_of(content: bytes) -> ElementTree.Element:
    """The root of an XML file. Entities from other files are never fetched: a file that names one is refused.

    Raises:
        ValueError: it is no XML.
    """
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: an encoding that Python does not know
        raise ValueError(f"no XML that can be read: {error}") from None


def geometry_of(element: ElementTree.Element) -> tuple[str, list[float], float] | None:
    """Kind, points and rotation of a child of an <image>, as `defectcam.regions.region_of` takes them.

    None for tags and whatever has no pixels.

    Raises:
        ValueError, TypeError, AttributeError: a number is missing, or is none.
    """
    get, kind = element.get, element.tag
    if kind == "box":
        kind, points = "rectangle", [float(get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
    elif kind == "ellipse":
        x, y, rx, ry = (float(get(key)) for key in ("cx", "cy", "rx", "ry"))
        points = [x, y, x + rx, y - ry]
    elif kind == "mask":
        left, top, width, height = (int(get(key)) for key in ("left", "top", "width", "height"))
        points = [int(run) for run in get("rle").split(",")] + [left, top, left + width - 1, top + height - 1]
    elif get("points"):
        points = [float(value) for point in get("points").split(";") for value in point.split(",")]
    else:
        return None
    return kind, points, float(get("rotation") or 0)
