"""Draws an attribution over its picture. Called by `models.explain`, the server and the report."""

import numpy as np
from PIL import Image
from scipy import ndimage

_SMOOTHING = 1 / 56  # standard deviation, as a share of the map's side; single pixels of a gradient are noise to the eye
_PERCENTILE = 99.5  # of the absolute values: drawn with the full colour, as are those above
_MAX_OPACITY = 0.8
# Of the palette of Okabe and Ito, which colour-blind people tell apart.
_FOR_COLOR = (213, 94, 0)
_AGAINST_COLOR = (0, 114, 178)


def smooth(attribution: np.ndarray) -> np.ndarray:
    """Smooths float32 [height, width] as it is drawn, by `_SMOOTHING` of each side."""
    return ndimage.gaussian_filter(attribution, [_SMOOTHING * side for side in attribution.shape])


def overlay(image: Image.Image, attribution: np.ndarray) -> Image.Image:
    """Draws an attribution over its image: orange speaks for the class, blue against it.

    The image becomes grey, as colours would mix. It may have another size and aspect than the attribution, as the network
    squeezes its input into a square; the map is stretched back.

    Args:
      image: RGB.
      attribution: float32 [height, width], any range.

    Returns:
      An RGB image of the size of `image`.

    Raises:
      ValueError: if a value of the attribution is not finite.
    """
    if not np.isfinite(attribution).all():
        raise ValueError("Expected an attribution of finite values. Received: some that are not. Check the model's weights.")
    strength = smooth(attribution)
    scale = np.percentile(np.abs(strength), _PERCENTILE)
    strength = np.clip(strength / scale, -1, 1) if scale > 0 else np.zeros_like(strength)
    stretched = Image.fromarray(strength.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    strength = np.asarray(stretched)[..., np.newaxis]
    color = np.where(strength > 0, _FOR_COLOR, _AGAINST_COLOR)
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32)
    opacity = _MAX_OPACITY * np.abs(strength)
    return Image.fromarray((grey * (1 - opacity) + color * opacity).round().astype(np.uint8))
