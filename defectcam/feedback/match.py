"""Proposals of a photo against the shapes its annotator left: accepted, modified, rejected, missed (paper 3.2).

First by name: the attribute `proposal`, which shapes keep when they are edited, relabelled or sliced. A copy keeps it
too, so a name counts only for shapes that overlap what was proposed. What has lost its name (joined shapes, reset or
unmapped attributes) is matched by overlap. One proposal and many shapes, or many and one, are judged as a group: the
union of the one side against the union of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from defectcam.feedback.cvat import UNTOUCHED, Shape
from defectcam.feedback.regions import common_px, edited_share, region_iou, saved_share, vertices
from defectcam.feedback.store import ACCEPTED, MISS, MODIFIED, REJECTED
from defectcam.proposals import Component
from defectcam.regions import AREA_TYPES, merged, region_of, resized, run_lengths

INSIDE_SHARE = 0.5  # of a region's pixels, for it to be taken as a part of the other
SAME_IOU = 0.95  # shapes that agree so well are one shape twice, as after a second automatic run
RELABELLED_IOU = 0.7  # an outline of another label that agrees so well was not drawn anew
RESIZED_IOU = 0.9  # an untouched shape on a resized photo agrees with its proposal up to rounding


@dataclass(frozen=True, eq=False)
class Proposal:
    """What the function proposed on a photo.

    Attributes:
        name: its `proposal` attribute, which tells it from the others of its photo.
        label: the defect.
        kind, points: as CVAT stores them, in px of the image that the function saw.
        outline: of a mask the polygon that was answered with it, which CVAT stores if masks are to be converted.
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


@dataclass(frozen=True)
class Placed:
    """A proposal on the photo as CVAT has it: its region (None if it cannot be placed) and how that was found."""

    proposal: Proposal
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
        Interactions, proposals first; and the shapes that cannot be judged: proposals that are not known, and what
        other models made.
    """
    regions = {shape.key: _shape_region(shape, width, height) for shape in shapes}
    shapes = _without_repetitions([shape for shape in shapes if regions[shape.key] is not None], regions)
    placed = _place(proposals, shapes, width, height)
    links, twice = _links_by_name(placed, shapes, regions)
    links |= _links_by_overlap(placed, shapes, regions, links, twice)
    found = []
    for proposal_indices, shape_indices in _groups(links, len(placed)):
        found += _judge(
            [placed[p] for p in proposal_indices], [shapes[s] for s in shape_indices], regions, width, height
        )
    own_names = {proposal.name for proposal in proposals}
    strangers = []
    linked = {s for _, s in links}
    for index, shape in enumerate(shapes):
        if index in linked or index in twice:
            continue
        change = "copied" if shape.proposal in own_names else "propagated"
        if shape.proposal not in own_names | known_elsewhere:
            if shape.proposal or shape.source == "auto":
                strangers.append(shape)
                continue
            change = "drawn"
        clicks = vertices(regions[shape.key])
        found.append(Interaction(MISS, change, None, (shape,), shape.label, shape.label, None, None, 1.0, 0.0, clicks))
    return found, strangers


def _shape_region(shape: Shape, width: int, height: int) -> Component | None:
    if shape.kind not in AREA_TYPES:
        return None
    return region_of(shape.kind, shape.points, width, height, shape.rotation)


def _without_repetitions(shapes: Sequence[Shape], regions: dict[str, Component]) -> list[Shape]:
    """Shapes without those that lie exactly on an equal one, as a second automatic run leaves them."""
    kept: dict[tuple, Shape] = {}
    for shape in shapes:
        region = regions[shape.key]
        kept.setdefault((shape.label, shape.proposal, region.box_xyxy, region.mask.tobytes()), shape)
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
            moved = [
                part and Component(part.mask, part.left + round(offset[0]), part.top + round(offset[1]))
                for part in (region, outline)
            ]
            placed.append(Placed(proposal, *moved))
        elif abs(factor_x / factor_y - 1) <= 2 * rounding:
            placed.append(Placed(proposal, resized(region, factor_x, factor_y, width, height), is_resized=True))
        else:
            placed.append(Placed(proposal, None))
    return placed


def _offset(
    size: tuple[int, int], proposals: Sequence[Proposal], shapes: Sequence[Shape]
) -> tuple[float, float] | None:
    """Where the part of the photo lies that the function saw, told by a shape that was not moved since."""
    by_name = {p.name: p for p in proposals if (p.width, p.height) == size}
    for shape in shapes:
        proposal = by_name.get(shape.proposal)
        if not proposal or shape.kind != proposal.kind or len(shape.points) != len(proposal.points):
            continue
        before, after = proposal.points, shape.points
        if shape.kind == "mask":
            if before[:-4] != after[:-4]:
                continue
            before, after = before[-4:], after[-4:]
        moved_x = [b - a for a, b in zip(before[::2], after[::2])]
        moved_y = [b - a for a, b in zip(before[1::2], after[1::2])]
        if max(moved_x) - min(moved_x) < 0.05 and max(moved_y) - min(moved_y) < 0.05:
            return moved_x[0], moved_y[0]
    return None


def _links_by_name(placed, shapes, regions) -> tuple[set[tuple[int, int]], set[int]]:
    """(proposal, shape) pairs that belong together by name, and the shapes that merely repeat one of them."""
    links, twice = set(), set()
    for p, one in enumerate(placed):
        bearers = [s for s, shape in enumerate(shapes) if shape.proposal == one.proposal.name]
        if one.region is None:
            links |= {(p, s) for s in bearers[:1]}
            continue
        bearers = [s for s in bearers if common_px(one.region, regions[shapes[s].key])]
        # Of equal outlines the one that kept its label is the original, the other a copy that was relabelled.
        bearers.sort(key=lambda s: (-region_iou(one.region, regions[shapes[s].key]), shapes[s].label != one.proposal.label))
        taken: list[tuple[str, Component]] = []
        for s in bearers:
            label, region = shapes[s].label, regions[shapes[s].key]
            if any(label == own and region_iou(region, other) >= SAME_IOU for own, other in taken):
                twice.add(s)
                continue
            is_part = common_px(region, one.region) >= INSIDE_SHARE * region.area_px
            is_apart = all(common_px(region, other) < INSIDE_SHARE * region.area_px for _, other in taken)
            if not taken or is_part and is_apart:  # the parts of a sliced shape; anything else is a copy
                links.add((p, s))
                taken.append((label, region))
    return links, twice


def _links_by_overlap(placed, shapes, regions, links, twice) -> set[tuple[int, int]]:
    """Pairs of what has no partner by name; a proposal may also have been joined to a shape that has one."""
    linked_proposals, linked_shapes = {p for p, _ in links}, {s for _, s in links}
    found = set()
    for p, one in enumerate(placed):
        if p in linked_proposals or one.region is None:
            continue
        for s, shape in enumerate(shapes):
            region = regions[shape.key]
            both = common_px(one.region, region)
            if s in twice or not both:
                continue
            if shape.label != one.proposal.label:
                close = s not in linked_shapes and region_iou(one.region, region) >= RELABELLED_IOU
            elif s in linked_shapes:
                close = both >= INSIDE_SHARE * one.region.area_px
            else:
                close = both >= INSIDE_SHARE * min(one.region.area_px, region.area_px)
            if close:
                found.add((p, s))
    return found


def _groups(links: set[tuple[int, int]], proposals: int) -> list[tuple[list[int], list[int]]]:
    """Proposals and shapes that hang together, each proposal in exactly one group, in order."""
    groups: list[tuple[set[int], set[int]]] = []
    for p in range(proposals):
        own = ({p}, {s for q, s in links if q == p})
        for group in [group for group in groups if group[1] & own[1]]:
            groups.remove(group)
            own = (own[0] | group[0], own[1] | group[1])
        groups.append(own)
    return [(sorted(members), sorted(of)) for members, of in sorted(groups, key=lambda group: min(group[0]))]


def _judge(placed: list[Placed], shapes: list[Shape], regions, width: int, height: int) -> list[Interaction]:
    """One interaction per proposal of a group."""
    if not shapes:
        return [
            Interaction(REJECTED, "", one.proposal, (), one.proposal.label, None, _proposed(one), 0.0, 1.0, None, 0)
            for one in placed
        ]
    after = merged([regions[shape.key] for shape in shapes])
    largest = max(shapes, key=lambda shape: regions[shape.key].area_px)
    before = [one.region for one in placed if one.region is not None]
    same = len(placed) == len(shapes) == 1 and _is_same(placed[0], shapes[0], after)
    if same:
        iou, edited, saved = 1.0, 0.0, 1.0
    elif before:
        union = merged(before)
        iou, edited = region_iou(union, after), edited_share(union, after)
        saved = saved_share(union, after, largest.label, width, height)
    else:
        iou = edited = saved = None
    found = []
    # The largest proposal answers for the shapes, so that no shape is counted twice.
    first = max(placed, key=lambda one: one.region.area_px if one.region else 0)
    for one in placed:
        relabelled = one.proposal.label != largest.label
        changes = {
            "edited": not same,
            "relabelled": relabelled,
            "sliced": len(shapes) > 1,
            "joined": len(placed) > 1,
        }
        found.append(
            Interaction(
                outcome=ACCEPTED if same and not relabelled else MODIFIED,
                change=",".join(name for name, happened in changes.items() if happened),
                proposal=one.proposal,
                shapes=tuple(shapes) if one is first else (),
                defect=one.proposal.label,
                final_defect=largest.label,
                proposed=_proposed(one),
                iou=iou,
                edited_share=edited,
                saved=saved,
                vertices=vertices(after) if one is first else 0,
            )
        )
    return found


def _is_same(one: Placed, shape: Shape, after: Component) -> bool:
    """Whether the outline is the proposed one, pixel by pixel; where that cannot be told, what CVAT says."""
    if one.region is None:
        return shape.source in UNTOUCHED
    if one.is_resized:
        return shape.source in UNTOUCHED and region_iou(one.region, after) >= RESIZED_IOU
    wanted = [region for region in (one.region, one.outline) if region is not None]
    return any(region.area_px == after.area_px == common_px(region, after) for region in wanted)


def _proposed(one: Placed) -> dict | None:
    """The proposal's geometry in px of the photo."""
    if one.region is None:
        return None
    return {"type": "mask", "points": run_lengths(one.region)}
