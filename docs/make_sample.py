"""Make docs/sample.jpg: a synthetic photo of damaged concrete that anybody may use freely.

No data set's photo is shipped with this project. Instead the sample is modelled as a scene, a colour and a
height for every pixel, lit from the upper left and "photographed". Its grain is real: it comes from the CC0
textures inside scikit-image's wheel, without a download. Below, ``s`` is the scale: 1 at 1200 pixels.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data, measure

DEFECTS = ("crack", "spalling", "rust")


def smoothstep(low, high, x):
    """Rise softly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - low) / (high - low), 0, 1, dtype=np.float32)
    return t * t * (3 - 2 * t)


def blur(image, sigma):
    """Gaussian blur."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def clouds(shape, size, rng, octaves=4):
    """Fractal noise of unit variance whose largest lumps measure ``size`` pixels (or rows, columns)."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cells = [int(np.ceil(n / s * 2**octave)) + 3 for n, s in zip(shape, np.broadcast_to(size, 2))]
        coarse = rng.standard_normal(np.minimum(cells, shape), dtype=np.float32)
        total += cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC) * 0.55**octave
    return (total - total.mean()) / total.std()


def texture(image, shape, scale, rng, layers=4):
    """Fill ``shape`` with a real texture of unit variance: mirrored tilings mixed so that none shows."""
    tile = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.float32)
    tile -= blur(tile, max(tile.shape) / 10)
    total, power = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for _ in range(layers):
        turned = np.rot90(tile / tile.std(), rng.integers(4))
        pads = [(int(rng.integers(n)), m) for n, m in zip(turned.shape, shape)]
        weight = np.exp(3 * clouds(shape, max(tile.shape), rng, 2))
        total += weight * np.pad(turned, pads, mode="symmetric")[: shape[0], : shape[1]]
        power += weight**2
    return total / np.sqrt(power)  # the root keeps the contrast where two tilings mix


def concrete(shape, s, rng):
    """Colour and height of a sound, board-marked concrete face."""
    sand, paste = texture(data.gravel(), shape, 0.17 * s, rng), texture(data.grass(), shape, 0.5 * s, rng)
    relief = 0.10 * sand + 0.04 * paste + 0.35 * clouds(shape, 90 * s, rng, 2)
    tone = 172 + 3.6 * sand + 2.4 * paste + 5 * clouds(shape, 420 * s, rng, 6)
    tone -= 7 * smoothstep(0.4, 2.2, clouds(shape, (500 * s, 45 * s), rng))  # faint run-off
    tone += 2.5 * clouds(shape, 25 * s, rng, 3) - 10 * smoothstep(0.7, 2.0, clouds(shape, 230 * s, rng, 6))
    rows = np.float32(np.arange(shape[0])[:, None]) + 1.5 * s * clouds(shape, (200 * s, 900 * s), rng, 3)
    faint = smoothstep(-1.5, 1, clouds(shape, 150 * s, rng))
    edges = s * (rng.uniform(-40, 90) + np.cumsum(rng.uniform(190, 250, int(shape[0] / (190 * s)))))
    for edge, board in zip(edges, rng.normal(0, 1, len(edges))):  # the joints between formwork boards
        seam = np.exp(-(((rows - edge) / (1.3 * s)) ** 2)) * faint
        relief += 0.7 * seam
        tone += 2 * board * smoothstep(-2 * s, 2 * s, rows - edge) - 9 * seam
    pores = np.zeros(shape, np.float32)
    for _ in range(170):  # bugholes left by trapped air; OpenCV counts in sixteenths of a pixel here
        centre, radius = rng.integers(0, 16 * np.array(shape[::-1])), s * min(0.8 + rng.exponential(1.0), 5)
        axes = [int(16 * radius * n) for n in (1, rng.uniform(0.6, 1))]
        cv2.ellipse(pores, centre.tolist(), axes, rng.uniform(0, 180), 0, 360, radius, -1, cv2.LINE_AA, 4)
    pores = blur(pores, 0.6 * s)
    warmth = clouds(shape, 300 * s, rng)[..., None] * np.float32([0.8, 0.1, -1.0])
    return (tone - 9 * pores)[..., None] * np.float32([1.0, 0.975, 0.92]) + warmth, relief - 1.1 * pores


def around(x, y, shape):
    """Each pixel's columns and rows away from the point at these shares of the width and height."""
    return np.meshgrid(*(np.arange(n, dtype=np.float32) - c * n for n, c in zip(shape[::-1], (x, y))))


def walk(start, heading, length, width, s, rng, branches=2, thin_start=True):
    """Random walk of a crack as (x, y, width) points, followed by those of its thinner branches."""
    n = int(length / (3 * s))
    along, wander = np.linspace(0, 1, n), np.cumsum(rng.normal(0, 0.035, n))
    wander -= 0.7 * along * wander[-1]
    angle = heading + wander + np.repeat(rng.normal(0, 0.5, n), 5)[:n] + rng.normal(0, 0.25, n)
    points = start + np.cumsum(3 * s * np.stack([np.cos(angle), np.sin(angle)], 1), axis=0)
    swell = np.interp(along, np.linspace(0, 1, 14), rng.uniform(0.6, 1.15, 14))
    taper = np.clip(np.minimum(along / 0.25 if thin_start else 1, (1 - along) / 0.35), 0, 1) ** 0.7
    lines = [np.column_stack([points, width * swell * (0.15 + 0.85 * taper)])]
    forks = (n * rng.uniform([0.25, 0.5], [0.45, 0.7])).astype(int)
    for at, side in zip(forks[:branches], rng.permutation([-1, 1])):
        turn, share = heading + wander[at] + side * rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.4)
        lines += walk(points[at], turn, share * length, width * 0.55, s, rng, branches - 1, False)
    return lines


def add_crack(colour, relief, s, rng, _):
    """Open a branching crack of 2 to 6 pixels; its walls crumble a little and its inside is dark."""
    shape, canvas = relief.shape, np.zeros(np.multiply(relief.shape, 4), np.uint8)
    for line in walk(np.array([0.35 * shape[1], 0.05 * shape[0]]), 1.1, 1.1 * shape[0], 5.6 * s, s, rng):
        for (*a, width), (*b, _) in zip(4 * line[:-1], 4 * line[1:]):
            cv2.line(canvas, [int(v) for v in a], [int(v) for v in b], 255, max(1, round(width)))
    opening = cv2.resize(canvas, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    crumbs = texture(data.gravel(), shape, 0.25 * s, rng) * (blur(opening, 2 * s) > 0.1)
    opening = np.maximum(smoothstep(0.3, 0.75, blur(opening, 0.9 * s) + 0.16 * crumbs), 0.75 * opening)
    worn = blur(opening, 3 * s)
    colour = colour * (1 - 0.78 * opening - 0.12 * worn)[..., None]
    return colour, relief - 5 * s * opening - 1.2 * s * worn, {"crack": opening > 0.4}


def add_spalling(colour, relief, s, rng, rusty):
    """Break some cover away: a wall around it, coarse aggregate within, one reinforcing bar laid bare."""
    shape, (x, y) = relief.shape, around(0.735, 0.27, relief.shape)
    field = 1 - np.hypot((x / 200 + y / 500) / s, y / 125 / s) + 0.16 * clouds(shape, 150 * s, rng, 5)
    labels = measure.label(field > 0)
    patch = labels == labels[int(0.27 * shape[0]), int(0.735 * shape[1])]
    inside = cv2.distanceTransform(patch.astype(np.uint8), cv2.DIST_L2, 5)
    stones, grit = (texture(data.gravel(), shape, size * s, rng, 2) for size in (0.9, 0.3))
    embedded = smoothstep(-0.9, 0.3, blur(stones, 1.5 * s) + 0.7 * clouds(shape, 50 * s, rng))
    depth = 15 * s * (1 - np.exp(-inside / (8 * s))) + 2.5 * s * clouds(shape, 80 * s, rng, 3)
    floor = relief - np.maximum(depth, 0) + s * (embedded * (1.0 + 0.8 * blur(stones, s)) + 0.25 * grit)
    tone = 118 + 7 * grit + embedded * (4 + 24 * stones) + 7 * clouds(shape, 80 * s, rng)
    sandy = clouds(shape, 40 * s, rng, 2)[..., None] * np.float32([0.02, 0.0, -0.025])
    broken = tone[..., None] * (np.float32([1.06, 0.98, 0.85]) + sandy)
    soft = blur(patch.astype(np.float32), 0.8 * s)
    relief = relief + soft * (floor - relief)
    colour = colour + soft[..., None] * (broken - colour)
    across = (y - 0.10 * x) / s - 13
    ribs = 0.9 * smoothstep(0.5, 0.9, np.cos((x / s + 0.5 * across) * 2 * np.pi / 13))
    bar = s * (np.sqrt(np.maximum(81 - across**2, 0)) + ribs - 14 + 1.5 * clouds(shape, 90 * s, rng, 3))
    bare = (inside > 6 * s) & (np.abs(across) < 9) & (bar > relief + 0.4 * s)
    steel = np.float32([106, 72, 54]) if rusty else np.float32([92, 88, 84])
    flakes = (1 + 0.12 * grit + 0.10 * stones + 0.18 * clouds(shape, 20 * s, rng))[..., None] * steel
    colour = colour + blur(bare.astype(np.float32), 0.7 * s)[..., None] * (flakes - colour)
    return colour, np.where(bare, bar, relief), {"spalling": patch, "rust": bare & rusty}


def add_rust(colour, relief, s, rng, _):
    """Stain the face from a corroded spot downwards; the run-off fades at its own pace in every column."""
    shape, (u, v) = relief.shape, np.array(around(0.17, 0.30, relief.shape)) / s
    u += 5 * clouds(shape, (260 * s, 80 * s), rng, 3)
    flow = rng.uniform(0, 1, 120) ** 2 + 0.5 * np.repeat(rng.uniform(0, 1, 24), 5)
    reach = 20 + 350 * np.exp(-((u / 80) ** 2)) * np.interp(u, np.arange(-300, 300, 5), flow)
    streaks = smoothstep(-10, 8, v) * np.exp(-np.maximum(v, 0) / reach - (u / 100) ** 4)
    ragged = np.exp(0.6 * clouds(shape, 60 * s, rng, 5))
    spot = np.exp(-(np.hypot(u / 80, v / np.where(v < 0, 20, 36)) ** 2) * ragged - (u / 135) ** 4)
    grain = 0.1 * texture(data.gravel(), shape, 0.2 * s, rng, 2) + 0.2 * clouds(shape, (90 * s, 14 * s), rng)
    alpha = 1 - np.exp(-(0.8 * streaks + 1.5 * spot) * np.maximum(1 + grain, 0.2))
    deep = smoothstep(0.35, 0.95, alpha)[..., None]
    dye = np.float32([0.94, 0.62, 0.34]) - deep * np.float32([0.44, 0.35, 0.19])
    return colour * (1 - alpha[..., None] * (1 - dye)), relief, {"rust": blur(alpha, 2 * s) > 0.25}


def photograph(colour, relief, s, rng, sun_slope=0.78):
    """Light the scene from the upper left with cast shadows, then add the lens's blur, vignette and noise."""
    down, right = np.gradient(blur(relief, 0.6 * s))
    facing = (1 + (down + right) / np.sqrt(2) / sun_slope) / np.sqrt(1 + down**2 + right**2)
    horizon = relief.copy()
    for row in range(1, len(relief)):  # the shadow's edge sinks along the diagonal
        horizon[row, 1:] = np.maximum(relief[row, 1:], horizon[row - 1, :-1] - np.sqrt(2) * sun_slope)
    sun = 1 - smoothstep(0, 2.5 * s, blur(horizon - relief, 1.2 * s))
    sky = 1 - 0.55 * smoothstep(0.5 * s, 12 * s, blur(relief, 9 * s) - relief)
    x, y = np.array(around(0.5, 0.5, relief.shape)) / relief.shape[1]
    lens = 1.06 - 0.45 * (x**2 + y**2) - 0.10 * x - 0.10 * y
    light = (0.55 * sky + 0.45 * sun * np.clip(facing, 0, 1.8)) * lens
    noise = rng.normal(0, 2.0, (*relief.shape, 1)) + rng.normal(0, 1.2, colour.shape)
    return np.clip(blur(colour * light[..., None], 0.75) + blur(noise, 0.5), 0, 255).round().astype(np.uint8)


def make_sample(width=1200, height=900, seed=0, defects=DEFECTS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the (H, W, 3) uint8 RGB picture and a bool mask for each of "crack", "spalling" and "rust".

    The concrete is the same whatever the defects. Masks may overlap: the bare rusty bar is spalling and rust.
    """
    ground, *own, camera = np.random.default_rng(seed).spawn(5)
    rngs, s = dict(zip(DEFECTS, own)), width / 1200
    colour, relief = concrete((height, width), s, ground)
    masks = {name: np.zeros((height, width), bool) for name in DEFECTS}
    for name, add in {"rust": add_rust, "crack": add_crack, "spalling": add_spalling}.items():
        if name in defects:
            colour, relief, found = add(colour, relief, s, rngs[name], "rust" in defects)
            lost = found.get("spalling", np.False_)  # what broke away took its cracks and stains along
            masks = {key: mask & ~lost | found.get(key, False) for key, mask in masks.items()}
    return photograph(colour, relief, s, camera), masks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write the sample photo.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python docs/make_sample.py --seed 3 --out another.jpg")
    parser.add_argument("--out", default=Path(__file__).with_name("sample.jpg"), help="where to write it")
    parser.add_argument("--seed", type=int, default=0, help="another number gives another wall")
    parser.add_argument("--healthy", action="store_true", help="leave the defects out")
    args = parser.parse_args()
    picture, _ = make_sample(seed=args.seed, defects=() if args.healthy else DEFECTS)
    Image.fromarray(picture).save(args.out, quality=90)
