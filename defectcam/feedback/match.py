"""Proposals of a photo against the shapes that its annotator left: accepted, modified, rejected, missed (paper 3.2).

Shapes are matched by name first. The name is the attribute `proposal`, which shapes keep when they are edited, relabelled or
sliced. Copies keep it too, so it counts only for shapes that overlap the proposal. Shapes without a known name (joined ones,
reset or unmapped attributes) are matched by overlap. Where one proposal belongs to many shapes, or many to one, their unions
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse.csgraph import connected_components

from defectcam.feedback.jobs import UNTOUCHED, Shape
from defectcam.feedback.regions import common_px, edited_share, region_iou, saved_share, vertices
from defectcam.feedback.store import ACCEPTED, MISS, MODIFIED, REJECTED
from defectcam.proposals import Component
from defectcam.regions import AREA_TYPES, merged, region_of, resized, run_lengths

INSIDE_SHARE = 0.5  # a region is part of another if the other has this share of its pixels
SAME_IOU = 0.95  # from here on two shapes are one shape twice, as after a second automatic run
RELABELLED_IOU = 0.7  # from here on an outline of another label was relabelled, not drawn
RESIZED_IOU = 0.9  # from here on an untouched shape on a resized photo is the proposal, up to rounding


@dataclass(frozen=True, eq=False)
class Proposal:
    """What the function proposed on a photo.

    Attributes:
        name: its `proposal` attribute, of which its photo has no other.
        label: the defect.
        kind, points: as CVAT stores them, in px of the image that the function saw.
        outline: of a mask, the polygon in the same answer; CVAT stores it where masks are converted to polygons.
        width, height: of that image, px.
        confidence, iterations, weights: "" where unknown.
        settings: in force for the defect, None where unknown.
    """

    name: str
    label: str
    kind: str
    points: tuple[float, ...]
    width: int
    height: int
    outline: tuple[float, ...] = ()
    confidence: str = ""
    iterations: str = ""
    weights: str = ""
    settings: dict | None = None


NO_PROPOSAL = Proposal("", "", "", (), 0, 0)  # of a miss


@dataclass(frozen=True)
class Interaction:
    """What became of a proposal, or a shape that had to be drawn; for the fields see `store.InteractionRow`."""

    outcome: str
    change: str
    proposal: Proposal | None
    shapes: tuple[Shape, ...]
    defect: str
    final_defect: str | None
    proposed: dict | None
    iou: float | None
    edited_share: float | None
    saved: float | None
    vertices: int

    @property
    def clicks(self) -> float:
        """What it cost: one click to look, and those edited or drawn."""
        return 1 + (self.edited_share or 0) * self.vertices


@dataclass(frozen=True, eq=False)
class Placed:
    """A proposal or shape (`item`) with its pixels on the photo as CVAT has it; `region` is None if they are not known.

    Attributes:
        outline: region of a proposed mask's polygon.
        is_resized: whether the function saw the photo in another size.
    """

    item: Proposal | Shape
    region: Component | None
    outline: Component | None = None
    is_resized: bool = False


def match(
    proposals: Sequence[Proposal],
    shapes: Sequence[Shape],
    width: int,
    height: int,
    known_elsewhere: frozenset[str] = frozenset(),
) -> tuple[list[Interaction], list[Shape]]:
    """What an annotator did on one photo.

    Args:
        proposals: all that were shown.
        shapes: all that are left, in px of the photo.
        width, height: of the photo in CVAT, px.
        known_elsewhere: names of proposals on other photos of the job, from where shapes may have been propagated.

    Returns:
        Interactions, proposals first; and the shapes that cannot be judged: those of unknown proposals or other models.
    """
    placed_shapes = _place_shapes(shapes, width, height)
    placed = _place(proposals, [one.item for one in placed_shapes], width, height)
    links, repeated = _links_by_name(placed, placed_shapes)
    links |= _links_by_overlap(placed, placed_shapes, links, repeated)
    found = []
    for proposal_indices, shape_indices in _groups(links, len(placed), len(placed_shapes)):
        found += _judge([placed[p] for p in proposal_indices], [placed_shapes[s] for s in shape_indices], width, height)
    names, unknown_shapes = {proposal.name for proposal in proposals}, []
    for index in sorted(set(range(len(placed_shapes))) - {s for _, s in links} - repeated):
        shape = placed_shapes[index].item
        if shape.proposal in names | known_elsewhere:
            change = "copied" if shape.proposal in names else "propagated"
        elif shape.proposal or shape.source == "auto":
            unknown_shapes.append(shape)
            continue
        else:
            change = "drawn"
        clicks = vertices(placed_shapes[index].region)
        found.append(Interaction(MISS, change, None, (shape,), shape.label, shape.label, None, None, 1.0, 0.0, clicks))
    return found, unknown_shapes


def _place_shapes(shapes: Sequence[Shape], width: int, height: int) -> list[Placed]:
    """The shapes that have pixels, without those that lie exactly on an equal one, as a second automatic run leaves them."""
    kept: dict[tuple, Placed] = {}
    for shape in shapes:
        region = region_of(shape.kind, shape.points, width, height, shape.rotation) if shape.kind in AREA_TYPES else None
        if region is not None:
            key = shape.label, shape.proposal, region.box_xyxy, region.mask.tobytes()
            kept.setdefault(key, Placed(shape, region))
    return list(kept.values())


def _place(proposals: Sequence[Proposal], shapes: Sequence[Shape], width: int, height: int) -> list[Placed]:
    """Proposals in px of the photo, whatever image the function saw: the same, a resized one, or a part of it."""
    offsets = {size: _offset(size, proposals, shapes) for size in {(p.width, p.height) for p in proposals}}
    placed = []
    for proposal in proposals:
        region = region_of(proposal.kind, proposal.points, proposal.width, proposal.height)
        outline = region_of("polygon", proposal.outline, proposal.width, proposal.height)
        offset = offsets[proposal.width, proposal.height]
        factor_x, factor_y = width / proposal.width, height / proposal.height
        rounding = 1 / min(proposal.width, proposal.height, width, height)
        if region is None or (width, height) == (proposal.width, proposal.height):
            placed.append(Placed(proposal, region, outline))
        elif offset:
            moved = [part and replace(part, left=part.left + offset[0], top=part.top + offset[1]) for part in (region, outline)]
            placed.append(Placed(proposal, *moved))
        elif abs(factor_x / factor_y - 1) <= 2 * rounding:
            placed.append(Placed(proposal, resized(region, factor_x, factor_y, width, height), is_resized=True))
        else:
            placed.append(Placed(proposal, None))
    return placed


def _offset(size: tuple[int, int], proposals: Sequence[Proposal], shapes: Sequence[Shape]) -> tuple[int, int] | None:
    """Where the part of the photo that the function saw lies, px; a shape that was not moved since tells.

    Args:
        size: of that part, px.
    """
    by_name = {p.name: p for p in proposals if (p.width, p.height) == size}
    for shape in shapes:
        proposal = by_name.get(shape.proposal)
        if not proposal or shape.kind != proposal.kind or len(shape.points) != len(proposal.points):
            continue
        before, after = np.array(proposal.points), np.array(shape.points)
        if shape.kind == "mask":
            if (before[:-4] != after[:-4]).any():
                continue
            before, after = before[-4:], after[-4:]
        moved_xy = (after - before).reshape(-1, 2)
        if (np.ptp(moved_xy, axis=0) < 0.05).all():
            return round(moved_xy[0, 0]), round(moved_xy[0, 1])
    return None


def _links_by_name(placed: Sequence[Placed], shapes: Sequence[Placed]) -> tuple[set[tuple[int, int]], set[int]]:
    """(proposal, shape) indices that belong together by name, and the shapes that merely repeat one of them."""
    links, repeated = set(), set()
    for p, proposal in enumerate(placed):
        named = [s for s, shape in enumerate(shapes) if shape.item.proposal == proposal.item.name]
        if proposal.region is None:
            links |= {(p, s) for s in named[:1]}
            continue
        named = [s for s in named if common_px(proposal.region, shapes[s].region)]
        # Of equal outlines the one that kept its label is the original, the other a copy that was relabelled.
        named.sort(key=lambda s: (-region_iou(proposal.region, shapes[s].region), shapes[s].item.label != proposal.item.label))
        linked: list[Placed] = []
        for s in named:
            label, region = shapes[s].item.label, shapes[s].region
            if any(label == other.item.label and region_iou(region, other.region) >= SAME_IOU for other in linked):
                repeated.add(s)
                continue
            is_part = common_px(region, proposal.region) >= INSIDE_SHARE * region.area_px
            is_apart = all(common_px(region, other.region) < INSIDE_SHARE * region.area_px for other in linked)
            if not linked or is_part and is_apart:  # the parts of a sliced shape; anything else is a copy
                links.add((p, s))
                linked.append(shapes[s])
    return links, repeated


def _links_by_overlap(
    placed: Sequence[Placed], shapes: Sequence[Placed], links: set[tuple[int, int]], repeated: set[int]
) -> set[tuple[int, int]]:
    """Links of proposals that have none by name; such a proposal may have been joined to a shape that has a link."""
    linked_proposals, linked_shapes = {p for p, _ in links}, {s for _, s in links}
    found = set()
    for p, proposal in enumerate(placed):
        if p in linked_proposals or proposal.region is None:
            continue
        for s, shape in enumerate(shapes):
            both = common_px(proposal.region, shape.region)
            if s in repeated or not both:
                continue
            if shape.item.label != proposal.item.label:
                close = s not in linked_shapes and region_iou(proposal.region, shape.region) >= RELABELLED_IOU
            elif s in linked_shapes:
                close = both >= INSIDE_SHARE * proposal.region.area_px
            else:
                close = both >= INSIDE_SHARE * min(proposal.region.area_px, shape.region.area_px)
            if close:
                found.add((p, s))
    return found


def _groups(links: set[tuple[int, int]], proposals: int, shapes: int) -> list[tuple[list[int], list[int]]]:
    """Indices of the proposals and of the shapes that links connect; every proposal is in one group, in order."""
    is_linked = np.zeros((proposals + shapes,) * 2, bool)
    for p, s in links:
        is_linked[p, proposals + s] = True
    group_of = connected_components(is_linked, directed=False)[1]
    groups = [np.flatnonzero(group_of == group) for group in dict.fromkeys(group_of[:proposals])]
    return [(group[group < proposals].tolist(), (group[group >= proposals] - proposals).tolist()) for group in groups]


def _judge(placed: list[Placed], shapes: list[Placed], width: int, height: int) -> list[Interaction]:
    """One interaction per proposal of a group."""
    if not shapes:
        return [
            Interaction(REJECTED, "", one.item, (), one.item.label, None, _proposed(one), 0.0, 1.0, None, 0) for one in placed
        ]
    after = merged([one.region for one in shapes])
    final_label = max(shapes, key=lambda one: one.region.area_px).item.label
    before = [one.region for one in placed if one.region is not None]
    same = len(placed) == len(shapes) == 1 and _is_same(placed[0], shapes[0])
    iou = edited = saved = None
    if same:
        iou, edited, saved = 1.0, 0.0, 1.0
    elif before:
        union = merged(before)
        iou, edited = region_iou(union, after), edited_share(union, after)
        saved = saved_share(union, after, final_label, width, height)
    found = []
    # The largest proposal answers for the shapes, so that no shape is counted twice.
    largest = max(placed, key=lambda one: one.region.area_px if one.region else 0)
    for one in placed:
        relabelled = one.item.label != final_label
        changes = {"edited": not same, "relabelled": relabelled, "sliced": len(shapes) > 1, "joined": len(placed) > 1}
        interaction = Interaction(
            outcome=ACCEPTED if same and not relabelled else MODIFIED,
            change=",".join(name for name, happened in changes.items() if happened),
            proposal=one.item,
            shapes=tuple(shape.item for shape in shapes) if one is largest else (),
            defect=one.item.label,
            final_defect=final_label,
            proposed=_proposed(one),
            iou=iou,
            edited_share=edited,
            saved=saved,
            vertices=vertices(after) if one is largest else 0,
        )
        found.append(interaction)
    return found


def _is_same(one: Placed, shape: Placed) -> bool:
    """Whether the outline is the proposed one, pixel by pixel; where that cannot be told, what CVAT says."""
    if one.region is None:
        return shape.item.source in UNTOUCHED
    if one.is_resized:
        return shape.item.source in UNTOUCHED and region_iou(one.region, shape.region) >= RESIZED_IOU
    wanted = [region for region in (one.region, one.outline) if region is not None]
    return any(region.area_px == shape.region.area_px == common_px(region, shape.region) for region in wanted)


def _proposed(one: Placed) -> dict | None:
    """The proposal's geometry in px of the photo."""
    return None if one.region is None else {"type": "mask", "points": run_lengths(one.region)}
