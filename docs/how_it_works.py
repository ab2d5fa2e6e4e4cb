"""Draws the pictures of docs/how-it-works.md from docs/sample.jpg and prints the figures that the page names.

    .venv/bin/python docs/how_it_works.py     # a minute or more on two CPU cores

docs/levels.jpg: the plain map of every level, and the merged map. docs/climb.jpg: the merged map at T = 0, 2 and 8 with the
outlines of the proposals. Maps are drawn as probabilities: where one is 0 the photo is seen, where one is 1 it is yellow.
"""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defectcam.image import MAX_MEGAPIXELS, decode_image
from defectcam.postprocess import regions
from defectcam.predict import Predictor, find_cores, proposals_for
from defectcam.proposals import Proposal, find_components, probability
from defectcam.pyramid import ENLARGED, PhotoMaps, PlainMaps, Pyramid
from defectcam.weights import DefectConfig, load_weights

DOCS = Path(__file__).resolve().parent
STEPS = (0, 2, 8)
LEVELS_SHOWN = ("crack", "spalling")  # rust's say nothing that these do not
PARTS = {"crack": (110, 190, 560, 490), "spalling": (0, 0, 1080, 720), "rust": (540, 90, 840, 290)}  # of the photo: x0, y0, x1, y1
PANEL_PX, GAP_PX, COLUMNS = (360, 240), 4, 3  # width and height of one small picture


def panel(photo_rgb: np.ndarray, defect: str, config: DefectConfig, logits: np.ndarray, text: str) -> Image.Image:
    """The defect's part of the photo, (H, W, 3) uint8, darkened; over it a map of the photo or of a level, (h, w) logits."""
    slope, intercept = config.platt
    height, width = photo_rgb.shape[:2]
    whole = cv2.resize(probability(slope * logits + intercept), (width, height), interpolation=cv2.INTER_NEAREST)
    x0, y0, x1, y1 = PARTS[defect]
    ground, over = (cv2.resize(image[y0:y1, x0:x1], PANEL_PX, interpolation=cv2.INTER_AREA) for image in (photo_rgb, whole))
    colour = cv2.applyColorMap((255 * over).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = np.minimum(2 * over, 1)[..., None]
    drawn = Image.fromarray(((1 - opacity) * 0.6 * ground + opacity * colour).astype(np.uint8))
    draw, font, place = ImageDraw.Draw(drawn), ImageFont.load_default(18), (6, PANEL_PX[1] - 8)
    draw.rectangle(draw.textbbox(place, text, font, anchor="ls"), "black", "black", 3)
    draw.text(place, text, "white", font, anchor="ls")
    return drawn


def outlined(drawn: Image.Image, defect: str, proposals: list[Proposal], shape: tuple[int, int]) -> Image.Image:
    """A panel with the outlines of proposals on a photo of that height and width."""
    mask = np.zeros(shape, np.uint8)
    for one in proposals:
        left, top, right, bottom = one.component.box_xyxy
        mask[top : bottom + 1, left : right + 1] |= one.component.mask
    x0, y0, x1, y1 = PARTS[defect]
    scale = np.array(PANEL_PX) / (x1 - x0, y1 - y0)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    points = [np.round((contour + 0.5 - (x0, y0)) * scale).astype(np.int32) for contour in contours]
    return Image.fromarray(cv2.polylines(np.array(drawn), points, True, (0, 255, 255), 1, cv2.LINE_AA))


def save(panels: list[Image.Image], name: str) -> None:
    width, height = (length + GAP_PX for length in PANEL_PX)
    sheet = Image.new("RGB", (COLUMNS * width - GAP_PX, -(-len(panels) // COLUMNS) * height - GAP_PX), "white")
    for number, drawn in enumerate(panels):
        sheet.paste(drawn, (number % COLUMNS * width, number // COLUMNS * height))
    sheet.save(DOCS / name, quality=85, optimize=True)


def print_pieces(config: DefectConfig, logits: np.ndarray, steps: int) -> None:
    """How many pieces lie above theta, and how many are left after each step of the cleaning."""
    cleaning, least = config.cleaning, config.least_logit(config.cam_threshold)
    stages = [replace(cleaning, closing_radius_px=0, gap_px=0, min_area_px=0), replace(cleaning, gap_px=0, min_area_px=0)]
    stages += [replace(cleaning, min_area_px=0), cleaning]
    counts = [len(find_components(regions(logits, least, stage))) for stage in stages]
    print(f"  T = {steps}: pieces above theta {counts[0]}, closed {counts[1]}, bridged {counts[2]}, large enough {counts[3]}")


def main() -> None:
    photo_rgb = decode_image((DOCS / "sample.jpg").read_bytes(), MAX_MEGAPIXELS * 1_000_000)
    weights = load_weights(DOCS.parent / "weights")
    predictor, pyramid = Predictor(weights), Pyramid(photo_rgb)
    print(f"weights {weights.version}")
    levels, climbed = [], []
    for defect in predictor.defects:
        config, plain = weights.configs[defect], PlainMaps()
        maps = PhotoMaps(predictor.engines[defect], config.reading, pyramid, plain=plain)
        merged = maps.merged()
        if defect in LEVELS_SHOWN:
            for scale in sorted(plain.levels, reverse=True):
                level = plain.levels[scale]
                if scale == ENLARGED:
                    level = np.where(maps.possible, level, -np.inf)
                words = f"{scale:g}" if scale >= 1 else f"1/{1 / scale:g}"
                levels.append(panel(photo_rgb, defect, config, level, f"{defect}, level {words}"))
            levels.append(panel(photo_rgb, defect, config, merged, f"{defect}, merged"))
        print(f"{defect}: theta {config.cam_threshold}, minimum confidence {config.threshold}")
        for core in find_cores(maps, config):
            print(f"  core in {core.component.box_xyxy}: {core.component.area_px} px, confidence {core.confidence:.2f}")
        for steps, found in proposals_for(maps, config, STEPS).items():
            print_pieces(config, maps.merged(steps), steps)
            print(f"  T = {steps}: proposals of {[one.component.area_px for one in found]} px")
            drawn = panel(photo_rgb, defect, config, maps.merged(steps), f"{defect}, T = {steps}")
            climbed.append(outlined(drawn, defect, found, photo_rgb.shape[:2]))
    save(levels, "levels.jpg")
    save(climbed, "climb.jpg")


if __name__ == "__main__":
    main()
