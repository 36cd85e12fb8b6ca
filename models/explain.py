"""Why a model says so: a heat map beside the picture, as PNG, and the numbers, as JSON.

    python -m models.explain --model runs/elpv/serving_model --image cell.png --method xrai --output cell_xrai.png

About 10 seconds for the first picture on two CPU cores, most of them for loading the model, and 0.1 (Grad-CAM) to 6 (XRAI)
for each further one. Exit codes: 0 done; 1 failed; 2 the input is wrong.
"""

import argparse
import io
import json
import logging
import os
import posixpath
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if __name__ == "__main__":  # before the libraries below speak on the terminal
    warnings.simplefilter("ignore", FutureWarning)

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from data.errors import EXIT_DONE, InputError, report_error
from data.inspection import ImageLimits, UnusableImageError, inspect_image, is_remote, read_file
from models.attributions import BASELINES, DEFAULT_STEPS, METHODS, Explanation, check_settings, explain
from models.explainable import ExplainableModel, find_saved_model
from models.overlay import overlay, smooth
from models.progress import Progress

logger = logging.getLogger("tfx_vision")

MAX_IMAGES = 50  # of one PNG
NUM_REGIONS = 5  # in the JSON
_TOP_SHARE = 0.1  # of the picture, in which its regions are looked for where the method has none
_LONGEST_SIDE = 512  # pixels, of a picture in the PNG
_SHORTEST_LONGEST_SIDE = 256  # pixels; a smaller picture is enlarged
_MARGIN = 12  # pixels
_FONT_SIZE = 20  # pixels
_INK = (32, 32, 32)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parse_arguments(argv)
    handler = logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        _explain_files(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug=arguments.debug)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return EXIT_DONE


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.explain",
        description="Shows what in a picture speaks for a class (orange) and against it (blue).",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong input.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="SavedModel, or a folder of its versions, of which the latest; or gs://"
    )
    parser.add_argument("--image", required=True, nargs="+", metavar="F", help="pictures, a row of the PNG for each")
    parser.add_argument("--method", default="integrated_gradients", choices=METHODS, help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="F.png", help="to write; the numbers go into F.json beside it")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="to explain (default: the most probable)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, metavar="N", help="gradients for a picture (default: %(default)s)"
    )
    parser.add_argument(
        "--baseline", default="blurred", choices=BASELINES, help="picture to explain against (default: %(default)s)"
    )
    parser.add_argument(
        "--noisy-copies", type=int, default=0, metavar="N", help="SmoothGrad: the mean over copies with noise (default: none)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _explain_files(arguments: argparse.Namespace) -> None:
    output = _check_output(arguments.output, arguments.image)
    # Whatever is wrong is said before the model is loaded, which takes seconds.
    check_settings(
        arguments.method, baseline=arguments.baseline, num_steps=arguments.steps, num_noisy_copies=arguments.noisy_copies
    )
    pictures = [_read_picture(path) for path in arguments.image]
    folder = find_saved_model(os.path.expanduser(arguments.model))
    logger.info("loading the model %s", folder)
    model = ExplainableModel(folder)
    class_index = _find_class(model, arguments.class_name)
    num_gradients = 1 if arguments.method == "grad_cam" else arguments.steps * max(1, arguments.noisy_copies)
    progress = Progress(f"{arguments.method}, gradients", total=len(pictures) * num_gradients)
    model.on_gradients = progress.advance
    rows, entries = [], []
    for path, encoded in zip(arguments.image, pictures, strict=True):
        explanation = explain(
            model,
            encoded,
            method=arguments.method,
            class_index=class_index,
            baseline=arguments.baseline,
            num_steps=arguments.steps,
            num_noisy_copies=arguments.noisy_copies,
        )
        name = model.class_names[explanation.class_index]
        rows.append(_draw_row(encoded, explanation, title=f"{name} {explanation.probability:.1%}", subtitle=Path(path).name))
        entries.append({"image": path} | describe(explanation, model.class_names))
    version = posixpath.basename(folder.rstrip("/"))
    document = {
        "model": {"folder": folder, "version": version if version.isdecimal() else None, "fingerprint": model.fingerprint},
        "explanations": entries,
    }
    _write(output, _stack(rows), document)
    for entry in entries:
        print(f"{entry['image']}: {entry['class']} {entry['probability']:.1%}")
    print(f"Picture  {output}\nNumbers  {output.with_suffix('.json')}")


def _check_output(path: str, images: Sequence[str]) -> Path:
    output = Path(path).expanduser()
    if is_remote(path) or output.suffix.lower() != ".png" or output.is_dir() or not output.parent.is_dir():
        raise InputError(
            f"Expected --output to be a .png file in a folder of this machine that is there. Received: {path!r}. "
            "Give one, such as explanation.png."
        )
    if any(not is_remote(image) and Path(image).expanduser().resolve() == output.resolve() for image in images):
        raise InputError(f"Expected --output to be another file than the pictures. Received: {path!r} for both. Rename it.")
    if len(images) > MAX_IMAGES:
        raise InputError(
            f"Expected at most {MAX_IMAGES} pictures, which go into one PNG. Received: {len(images)}. Call it several times."
        )
    return output


def _read_picture(path: str) -> bytes:
    """Reads a picture as the data set's preparation does: upright, and JPEG or PNG."""
    try:
        return inspect_image(read_file(os.path.expanduser(path)), ImageLimits()).encoded
    except UnusableImageError as error:
        raise InputError(f"Expected --image to be a picture. Received: {path!r}; {error}. Give another file.") from error


def _find_class(model: ExplainableModel, name: str | None) -> int | None:
    if name is None:
        return None
    if name not in model.class_names:
        raise InputError(
            f"Expected --class to be one of the model's {len(model.class_names)} classes, {', '.join(model.class_names[:20])}. "
            f"Received: {name!r}."
        )
    return model.class_names.index(name)


def describe(explanation: Explanation, class_names: Sequence[str]) -> dict[str, Any]:
    """Puts an explanation into numbers, ready for JSON.

    Args:
      explanation: of one picture.
      class_names: in the order of the probabilities.

    Returns:
      `method`, `class`, `probability`, `probabilities` (class -> probability), `baseline_probability`, `completeness_gap`,
      `approximation_error` (these three None for Grad-CAM), `parameters`, `sum_for` and `sum_against` (of the attribution's
      positive and negative values), and `regions`: the first `NUM_REGIONS`, each with `box` (left, top, right, bottom as shares
      of the picture), `area` (share of the picture) and `attribution` (the sum of the heat map in it).
    """
    return {
        "method": explanation.method,
        "class": class_names[explanation.class_index],
        "probability": explanation.probability,
        "probabilities": dict(zip(class_names, explanation.probabilities.tolist(), strict=True)),
        "baseline_probability": explanation.baseline_probability,
        "completeness_gap": explanation.completeness_gap,
        "approximation_error": explanation.approximation_error,
        "parameters": explanation.parameters,
        "sum_for": float(explanation.attribution.clip(min=0).sum(dtype=np.float64)),
        "sum_against": float(explanation.attribution.clip(max=0).sum(dtype=np.float64)),
        "regions": _top_regions(explanation),
    }


def _top_regions(explanation: Explanation) -> list[dict[str, Any]]:
    """Takes the regions of XRAI, or what hangs together among the tenth of the pixels with the largest smoothed values."""
    heat_map = explanation.heat_map
    labels = explanation.regions
    if labels is None:
        strength = smooth(heat_map)
        labels, _ = ndimage.label((strength > 0) & (strength >= np.quantile(strength, 1 - _TOP_SHARE)))
    height, width = heat_map.shape
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        rows, columns = box
        inside = labels[box] == label
        found.append(
            {
                "box": [columns.start / width, rows.start / height, columns.stop / width, rows.stop / height],
                "area": float(inside.sum() / labels.size),
                "attribution": float(heat_map[box][inside].sum(dtype=np.float64)),
            }
        )
    if explanation.regions is None:  # those of XRAI are in their order
        found.sort(key=lambda region: -region["attribution"])
    return found[:NUM_REGIONS]


def _draw_row(encoded: bytes, explanation: Explanation, *, title: str, subtitle: str) -> Image.Image:
    """Draws a picture beside its overlay, under a title."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    longest = max(picture.size)
    scale = min(_LONGEST_SIDE, max(_SHORTEST_LONGEST_SIDE, longest)) / longest
    picture = picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.LANCZOS)
    drawn = overlay(picture, explanation.heat_map)
    top = _MARGIN + 2 * round(1.4 * _FONT_SIZE)
    row = Image.new("RGB", (2 * picture.width + 3 * _MARGIN, top + picture.height + _MARGIN), "white")
    pen = ImageDraw.Draw(row)
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # the font with most alphabets that is installed anyway
    for number, (text, weight) in enumerate(((title, "-Bold"), (f"{subtitle} · {explanation.method.replace('_', ' ')}", ""))):
        font = ImageFont.truetype(str(fonts / f"DejaVuSans{weight}.ttf"), _FONT_SIZE if weight else 0.7 * _FONT_SIZE)
        text = _fit(text, font, width=row.width - 2 * _MARGIN)
        pen.text((_MARGIN, _MARGIN + number * round(1.4 * _FONT_SIZE)), text, fill=_INK, font=font)
    row.paste(picture, (_MARGIN, top))
    row.paste(drawn, (2 * _MARGIN + picture.width, top))
    return row


def _fit(text: str, font: ImageFont.FreeTypeFont, *, width: int) -> str:
    """Shortens a text until it fits."""
    shorter = text
    while font.getlength(shorter) > width and len(text) > 1:
        text = text[:-1]
        shorter = f"{text}…"
    return shorter


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def _write(output: Path, page: Image.Image, document: dict[str, Any]) -> None:
    """Writes both files, or neither."""
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".explanation-") as folder:
            picture, numbers = Path(folder, "page.png"), Path(folder, "page.json")
            page.save(picture)
            numbers.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(numbers, output.with_suffix(".json"))
            os.replace(picture, output)
    except OSError as error:
        raise InputError(
            f"Expected to write {str(output)!r} and its .json. Received: {error.strerror}. Give another --output."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
