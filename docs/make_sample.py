"""Make docs/sample.jpg: a synthetic photo of damaged concrete that anybody may use freely.

No data set's photo is shipped with this project. The sample is modelled instead as a small scene, a colour and a
height for every pixel, lit from the upper left and then "photographed". Its grain is real: it comes from the CC0
textures inside scikit-image's wheel, so nothing is downloaded.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from skimage import data, measure

DEFECTS = ("crack", "spalling", "rust")
LIGHT_ELEVATION = np.deg2rad(38)


def smoothstep(low, high, x):
    """Rise softly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - low) / (high - low), 0, 1, dtype=np.float32)
    return t * t * (3 - 2 * t)


def blur(image, sigma):
    """Gaussian blur."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def clouds(shape, size, rng, octaves=4):
    """Fractal noise of unit variance; its largest lumps measure ``size`` pixels, a number or (rows, columns)."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cells = [int(np.ceil(n / s * 2**octave)) + 3 for n, s in zip(shape, np.broadcast_to(size, 2))]
        coarse = rng.standard_normal([min(c, n) for c, n in zip(cells, shape)], dtype=np.float32)
        total += cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC) * 0.55**octave
    return (total - total.mean()) / total.std()


def texture(image, shape, scale, rng, layers=4):
    """Fill ``shape`` with a real texture of zero mean and unit variance, without a visible repeat.

    Mirrored tilings of the image, each shifted and flipped by chance, take turns under soft random weights. Dividing
    by the root of the summed squares keeps the contrast where two of them mix.
    """
    tile = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.float32)
    tile -= blur(tile, max(tile.shape) / 10)
    tile /= tile.std()
    total, power = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for _ in range(layers):
        turned = np.rot90(tile, rng.integers(4))
        pads = [(int(rng.integers(n)), m) for n, m in zip(turned.shape, shape)]
        layer = np.pad(turned, pads, mode="symmetric")[: shape[0], : shape[1]]
        weight = np.exp(3 * clouds(shape, max(tile.shape), rng, 2))
        total, power = total + weight * layer, power + weight**2
    return total / np.sqrt(power)


def concrete(shape, s, rng):
    """Colour and height of a sound board-marked concrete face; ``s`` is the size of a pixel's worth of detail."""
    height, width = shape
    sand, paste = texture(data.gravel(), shape, 0.17 * s, rng), texture(data.grass(), shape, 0.5 * s, rng)
    relief = 0.10 * sand + 0.04 * paste + 0.35 * clouds(shape, 90 * s, rng, 2)
    tone = 172 + 3.6 * sand + 2.4 * paste + 5 * clouds(shape, 420 * s, rng, 6) + 2.5 * clouds(shape, 25 * s, rng, 3)
    tone -= 7 * smoothstep(0.4, 2.2, clouds(shape, (500 * s, 45 * s), rng))               # faint run-off
    tone -= 10 * smoothstep(0.7, 2.0, clouds(shape, 230 * s, rng, 6))                     # blotches
    rows = np.arange(height, dtype=np.float32)[:, None] + 1.5 * s * clouds(shape, (200 * s, 900 * s), rng, 3)
    faint = smoothstep(-1.5, 1, clouds(shape, 150 * s, rng))
    edges = rng.uniform(60, 190) * s + np.cumsum(rng.uniform(190, 250, int(height / (190 * s)))) * s - 100 * s
    for edge, board in zip(edges, rng.normal(0, 1, len(edges))):           # the joints between formwork boards
        seam = np.exp(-(((rows - edge) / (1.3 * s)) ** 2)) * faint
        relief += 0.7 * seam
        tone += 2 * board * smoothstep(-2 * s, 2 * s, rows - edge) - 9 * seam
    pores = np.zeros(shape, np.float32)
    for _ in range(170):                                                   # bugholes left by trapped air
        centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        radius = s * min(0.8 + rng.exponential(1.0), 5)
        axes = (int(16 * radius), int(16 * radius * rng.uniform(0.6, 1)))
        cv2.ellipse(pores, tuple(16 * c for c in centre), axes, rng.uniform(0, 180), 0, 360,
                    float(radius), -1, cv2.LINE_AA, 4)
    pores = blur(pores, 0.6 * s)
    tone -= 9 * pores
    warmth = clouds(shape, 300 * s, rng)[..., None] * np.array([0.8, 0.1, -1.0])
    return (tone[..., None] * np.array([1.0, 0.975, 0.92]) + warmth).astype(np.float32), relief - 1.1 * pores


def walk(start, heading, length, width, s, rng, branches=2, thin_start=True):
    """Random walk of a crack as (x, y, width) points, followed by those of its thinner branches."""
    n, step = int(length / (3 * s)), 3 * s
    wander, jag = np.cumsum(rng.normal(0, 0.035, n)), rng.normal(0, 0.5, n)
    wander -= np.linspace(0, 0.7 * wander[-1], n)
    angle = heading + wander + np.repeat(jag, 5)[:n] + rng.normal(0, 0.25, n)
    points = np.array(start) + np.cumsum(step * np.stack([np.cos(angle), np.sin(angle)], 1), axis=0)
    along = np.linspace(0, 1, n)
    swell = np.interp(along, np.linspace(0, 1, 14), rng.uniform(0.6, 1.15, 14))
    taper = np.minimum(1, np.minimum(along / 0.25 if thin_start else 1, (1 - along) / 0.35)) ** 0.7
    lines = [np.column_stack([points, width * swell * (0.15 + 0.85 * taper)])]
    for at, side in list(zip(rng.uniform([0.25, 0.5], [0.45, 0.7]), rng.permutation([-1, 1])))[:branches]:
        turn = heading + wander[int(at * n)] + side * rng.uniform(0.6, 0.9)
        share = rng.uniform(0.25, 0.4)
        lines += walk(points[int(at * n)], turn, length * share, width * 0.55, s, rng, branches - 1, False)
    return lines


def add_crack(colour, relief, s, rng):
    """Open a branching crack of 2 to 6 pixels; the walls crumble a little and its inside is dark."""
    shape, fine = relief.shape, 4
    canvas = np.zeros([n * fine for n in shape], np.uint8)
    start = (0.35 * shape[1], 0.05 * shape[0])
    for line in walk(start, 1.1, 1000 * s, 5.6 * s, s, rng):
        for a, b in zip(line[:-1], line[1:]):
            cv2.line(canvas, *[tuple(int(v * fine) for v in p[:2]) for p in (a, b)], 255, max(1, round(fine * a[2])))
    opening = cv2.resize(canvas, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    ragged = blur(opening, 0.9 * s) + 0.16 * texture(data.gravel(), shape, 0.25 * s, rng) * (blur(opening, 2 * s) > 0.1)
    opening = np.maximum(smoothstep(0.3, 0.75, ragged), 0.75 * opening)
    worn = blur(opening, 3 * s)
    colour *= (1 - 0.78 * opening - 0.12 * worn)[..., None]
    return colour, relief - 5 * s * opening - 1.2 * s * worn, {"crack": opening > 0.4}


def add_spalling(colour, relief, s, rng, rusty):
    """Break a piece of the cover away: a wall around it, coarse aggregate within, one reinforcing bar laid bare."""
    shape = relief.shape
    y, x = np.indices(shape, dtype=np.float32)
    dx, dy = (x - 0.735 * shape[1]) / (200 * s), (y - 0.27 * shape[0]) / (125 * s)
    field = 1 - np.hypot(dx + 0.25 * dy, dy) + 0.16 * clouds(shape, 150 * s, rng, 5)
    labels = measure.label(field > 0)
    patch = labels == labels[int(0.27 * shape[0]), int(0.735 * shape[1])]
    inside = cv2.distanceTransform(patch.astype(np.uint8), cv2.DIST_L2, 5)
    stones, grit = texture(data.gravel(), shape, 0.9 * s, rng, 2), texture(data.gravel(), shape, 0.3 * s, rng)
    embedded = smoothstep(-0.9, 0.3, blur(stones, 1.5 * s) + 0.7 * clouds(shape, 50 * s, rng))
    floor = 15 * s * (1 - np.exp(-inside / (8 * s))) + 2.5 * s * clouds(shape, 80 * s, rng, 3)
    floor = relief - np.maximum(floor, 0) + s * embedded * (1.0 + 0.8 * blur(stones, s)) + 0.25 * s * grit
    tone = (118 + 7 * grit + embedded * (4 + 24 * stones) + 7 * clouds(shape, 80 * s, rng))[..., None]
    tint = clouds(shape, 30 * s, rng, 2)[..., None] * np.array([0.02, 0.0, -0.025])
    broken = tone * (np.array([1.05, 0.97, 0.85]) + tint)
    soft = blur(patch.astype(np.float32), 0.8 * s)
    relief = relief + soft * (floor - relief)
    colour = colour + soft[..., None] * (broken - colour)

    across = (y - 0.285 * shape[0]) - 0.10 * (x - 0.735 * shape[1])
    radius = 9 * s
    ribs = 0.9 * s * smoothstep(0.5, 0.9, np.cos((x + 0.5 * across) * 2 * np.pi / (13 * s)))
    bar = np.sqrt(np.maximum(radius**2 - across**2, 0)) + ribs - (14 - 1.5 * clouds(shape, 90 * s, rng, 3)) * s
    bare = patch & (np.abs(across) < radius) & (bar > relief + 0.4 * s)
    steel = np.array([104, 70, 52]) if rusty else np.array([92, 88, 84])
    flakes = (1 + 0.12 * grit + 0.10 * stones + 0.16 * clouds(shape, 18 * s, rng))[..., None]
    bright = smoothstep(0.2, 1.6, clouds(shape, 25 * s, rng))[..., None] * (np.array([30, 10, 0]) if rusty else 0)
    edge = blur(bare.astype(np.float32), 0.7 * s)[..., None]
    colour = colour + edge * (flakes * steel + bright - colour)
    return colour, np.where(bare, bar, relief), {"spalling": patch, "rust": bare & rusty}


def add_rust(colour, relief, s, rng):
    """Stain the face from a corroded spot downwards, with run-off that fades at its own pace in every column."""
    shape = relief.shape
    y, x = np.indices(shape, dtype=np.float32)
    x += 5 * s * clouds(shape, (260 * s, 80 * s), rng, 3)
    u, v = (x - 0.17 * shape[1]) / s, (y - 0.30 * shape[0]) / s
    columns = np.interp(u, np.arange(-300, 300, 5), rng.uniform(0, 1, 120) ** 2) + 0.5 * np.interp(
        u, np.arange(-300, 300, 24), rng.uniform(0, 1, 25))
    reach = 350 * columns * np.exp(-((u / 80) ** 2)) + 20
    streaks = smoothstep(-10, 8, v) * np.exp(-np.maximum(v, 0) / reach) * np.exp(-((u / 100) ** 4))
    lumps = clouds(shape, 60 * s, rng, 5)
    spot = np.exp(-np.hypot(u / 80, v / np.where(v < 0, 20, 36)) ** 2 * np.exp(0.6 * lumps) - (u / 135) ** 4)
    grain = 1 + 0.10 * texture(data.gravel(), shape, 0.2 * s, rng) + 0.2 * clouds(shape, (90 * s, 14 * s), rng)
    alpha = 1 - np.exp(-(0.8 * streaks + 1.5 * spot) * np.maximum(grain, 0.2))
    crust = smoothstep(0.35, 0.8, spot * (1 + 0.35 * clouds(shape, 22 * s, rng)))[..., None]
    deep = np.clip(smoothstep(0.35, 1.0, alpha)[..., None] + 0.5 * crust, 0, 1)
    dye = (1 - deep) * np.array([0.94, 0.62, 0.34]) + deep * np.array([0.50, 0.27, 0.15])
    return colour * (1 - alpha[..., None] * (1 - dye)), relief, {"rust": blur(alpha, 2 * s) > 0.25}


def photograph(colour, relief, s, rng):
    """Light the scene from the upper left with cast shadows, then add the lens's blur, vignette and noise."""
    down, right = np.gradient(blur(relief, 0.6 * s))
    facing = (1 + (down + right) / np.sqrt(2) / np.tan(LIGHT_ELEVATION)) / np.sqrt(1 + down**2 + right**2)
    horizon, drop = relief.copy(), np.sqrt(2) * np.tan(LIGHT_ELEVATION)
    for row in range(1, len(relief)):                                      # the shadow line falls along the diagonal
        horizon[row, 1:] = np.maximum(relief[row, 1:], horizon[row - 1, :-1] - drop)
    sun = 1 - smoothstep(0, 2.5 * s, blur(horizon - relief, 1.2 * s))
    sky = 1 - 0.55 * smoothstep(0.5 * s, 12 * s, blur(relief, 9 * s) - relief)
    light = 0.55 * sky + 0.45 * sun * np.clip(facing, 0, 1.8)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in relief.shape], indexing="ij")
    light *= 1.06 - 0.10 * (x**2 + y**2) - 0.05 * x - 0.04 * y
    image = blur((colour * light[..., None]).astype(np.float32), 0.75)
    noise = rng.normal(0, 2.0, relief.shape)[..., None] + rng.normal(0, 1.2, image.shape)
    return np.clip(image + blur(noise, 0.5), 0, 255).round().astype(np.uint8)


def make_sample(width=1200, height=900, seed=0, defects=DEFECTS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the (H, W, 3) uint8 RGB picture and a bool mask for each of "crack", "spalling" and "rust".

    Without a defect the very same concrete remains, and ``defects=()`` gives a healthy face. Masks may overlap: the
    corroded bar inside the spalling counts as rust too.
    """
    shape, s = (height, width), width / 1200
    rngs = dict(zip(("concrete", *DEFECTS, "camera"), np.random.default_rng(seed).spawn(5)))
    colour, relief = concrete(shape, s, rngs["concrete"])
    masks = {name: np.zeros(shape, bool) for name in DEFECTS}
    steps = {"rust": add_rust, "crack": add_crack,
             "spalling": lambda *scene: add_spalling(*scene, rusty="rust" in defects)}
    for name, step in steps.items():
        if name in defects:
            colour, relief, found = step(colour, relief, s, rngs[name])
            masks = {key: mask & ~found.get("spalling", np.False_) | found.get(key, False) for key, mask in masks.items()}
    return photograph(colour, relief, s, rngs["camera"]), masks


def main():
    """Write the picture, and on request its masks."""
    parser = argparse.ArgumentParser(
        description="Write the sample photo (synthetic, free to use).", formatter_class=argparse.RawTextHelpFormatter,
        epilog="example:\n  python docs/make_sample.py --seed 3 --out another.jpg")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sample.jpg"), help="where to write it")
    parser.add_argument("--seed", type=int, default=0, help="another number gives another wall")
    parser.add_argument("--healthy", action="store_true", help="leave the defects out")
    args = parser.parse_args()
    image, _ = make_sample(seed=args.seed, defects=() if args.healthy else DEFECTS)
    cv2.imwrite(str(args.out), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    print(f"{args.out}: {image.shape[1]} x {image.shape[0]}, {args.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
