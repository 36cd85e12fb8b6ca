"""A network whose reasons are known by hand: it looks for stripes of red, or of blue, and at nothing else.

And a picture with both, so that whatever explains one class must lie on the one object, and for the other class on the other.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import tensorflow as tf
from conftest import CLASS_NAMES

from models.classifier import StatisticsPooling
from models.signatures import ImageClassifier, export
from preprocessing.images import decode_images

SIZE = 96  # pixels
RED_BOX = (slice(16, 40), slice(12, 44))  # rows, columns
BLUE_BOX = (slice(56, 84), slice(48, 84))
_THRESHOLD = 160  # grey levels by which red is above the mean of the others: that of the blurred stripes is lower


def make_picture() -> np.ndarray:
    """Draws uint8 [SIZE, SIZE, 3]: stripes of red and of blue, two pixels wide, on grey noise."""
    grey = np.random.default_rng(3).integers(110, 140, (SIZE, SIZE, 1), np.uint8)
    picture = np.repeat(grey, 3, axis=2)
    is_striped = (np.arange(SIZE) // 2 % 2 == 0)[:, np.newaxis]
    for (rows, columns), channel in ((RED_BOX, 0), (BLUE_BOX, 2)):
        picture[rows, columns] = 0
        picture[rows, columns, channel] = 255 * is_striped[rows]
    return picture


def build_network(*, has_maps: bool = True) -> keras.Model:
    """Builds the network: circle for red, square for blue; without maps it pools as a model that gives one vector does."""
    image = keras.Input((SIZE, SIZE, 3), name="image")
    colours = keras.layers.Conv2D(2, 1, activation="relu", name="colours")
    features = colours(image)
    if has_maps:
        statistics = StatisticsPooling(covariance=False, name="feature_map0_pool")(features)
    else:
        statistics = keras.layers.GlobalAveragePooling2D()(features)
    logits = keras.layers.Dense(2, name="logits")
    network = keras.Model(image, keras.layers.Softmax(name="probabilities")(logits(statistics)), name="classifier")
    red, blue = (1, -0.5, -0.5), (-0.5, -0.5, 1)
    colours.set_weights([np.transpose([red, blue])[np.newaxis, np.newaxis], np.full(2, -_THRESHOLD)])
    kernel = np.zeros(logits.kernel.shape)
    kernel[0, 0] = kernel[1, 1] = 1  # of the means, which come first
    logits.set_weights([kernel, np.zeros(2)])
    return network


def export_network(folder: Path, *, has_maps: bool = True) -> Path:
    """Exports the network as the trainer does."""
    transform = SimpleNamespace(
        images=functools.partial(decode_images, image_size=SIZE), labels=lambda labels: tf.zeros_like(labels, tf.int64)
    )
    export(ImageClassifier(build_network(has_maps=has_maps), transform, CLASS_NAMES), str(folder))
    return folder


def lies_on(heat_map: np.ndarray, box: tuple[slice, slice]) -> bool:
    """Tells whether what speaks for the class is at least twice as dense in a box as outside of it."""
    inside = np.zeros(heat_map.shape, bool)
    inside[box] = True
    strength = heat_map.clip(min=0)
    return bool(strength[inside].mean() > 2 * strength[~inside].mean())
