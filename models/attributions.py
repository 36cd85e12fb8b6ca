"""What in a picture speaks for a class: the methods of the `saliency` library on an exported model.

`explain` is the one entry; every gradient runs through the model's own signatures, see `models.explainable`. Called by
`models.explain`, by the server and, for integrated gradients alone, by the report.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import saliency.core as saliency
import tensorflow as tf
from saliency.core import guided_ig
from saliency.core.blur_ig import gaussian_blur
from scipy import ndimage
from skimage.transform import resize

from data.errors import InputError
from models.explainable import ExplainableModel


def _quantile(values: np.ndarray, fraction: float, interpolation: str) -> np.ndarray:
    return np.quantile(values, fraction, method=interpolation)


# saliency 0.2.1 gives np.quantile an argument that NumPy 2.4 has no more; this is NumPy as that module knows it.
guided_ig.np = types.SimpleNamespace(**vars(np) | {"quantile": _quantile})

Method = Literal[
    "integrated_gradients", "blur_integrated_gradients", "guided_integrated_gradients", "xrai", "xrai_fast", "grad_cam"
]
METHODS: tuple[Method, ...] = get_args(Method)
Baseline = Literal["blurred", "black", "white", "mean"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

# The default baseline is the picture itself, blurred: as bright and as colourful, and without detail.
# Tested on the default data's eight most confident mistakes, by blurring the tenth of the picture that a map of 32 steps marks:
# the probability fell by 0.64 (by 0.28 where a random tenth was blurred). With a black baseline it fell by 0.25, no more than
# by chance: on the way from black the contrast is so low that the network's answers are erratic, and the sum does not converge.
BLUR = 1 / 28  # standard deviation, as a share of the image's side: 8 of 224 pixels
DEFAULT_STEPS = 32
MAX_STEPS = 2000
MAX_NOISY_COPIES = 50  # as Vertex AI allows
NOISE = 0.15  # standard deviation of the noise of SmoothGrad, as a share of the image's own range of grey levels
_MAX_PIXELS_PER_BATCH = 16 * 224**2  # of the images that are in memory at once with all of the network's activations
_MIN_CHANGE = 1e-3  # of a probability; less counts as this much, where an error is given as a share of it


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a model gives a class to a picture.

    Attributes:
      method: that found the attribution.
      class_index: of the class that is explained.
      probabilities: of all classes for the picture, float32 [num_classes].
      baseline_probability: of the class for the baseline, in [0, 1]; None for Grad-CAM, which has no baseline.
      attribution: what speaks for the class (positive) and against it. Of the integrated gradients float32 [height, width, 3],
        in probability, adding up to the change from the baseline to the picture; of XRAI float32 [height, width], the mean
        of these over each region, adding up likewise; of Grad-CAM float32 [height, width], 0 or more.
      completeness_gap: how far the attribution is from adding up to that change, in probability, 0 or more. None for Grad-CAM.
      regions: of XRAI int32 [height, width], the rank of each pixel's region, 1 the first; otherwise None.
      parameters: what else the method was given, ready for JSON.
    """

    method: Method
    class_index: int
    probabilities: np.ndarray
    baseline_probability: float | None
    attribution: np.ndarray
    completeness_gap: float | None
    regions: np.ndarray | None
    parameters: dict[str, Any]

    @property
    def probability(self) -> float:
        """Of the class for the picture, in [0, 1]."""
        return float(self.probabilities[self.class_index])

    @property
    def approximation_error(self) -> float | None:
        """The completeness gap as a share of the change of the probability, as Vertex AI reports it; 0 or more."""
        if self.completeness_gap is None or self.baseline_probability is None:
            return None
        return self.completeness_gap / max(abs(self.probability - self.baseline_probability), _MIN_CHANGE)

    @property
    def heat_map(self) -> np.ndarray:
        """The attribution of each pixel, its colours added: float32 [height, width]."""
        return self.attribution.sum(axis=-1) if self.attribution.ndim == 3 else self.attribution


def explain(
    model: ExplainableModel,
    image_bytes: bytes,
    *,
    method: Method,
    class_index: int | None = None,
    baseline: Baseline = "blurred",
    num_steps: int = DEFAULT_STEPS,
    num_noisy_copies: int = 0,
) -> Explanation:
    """Explains one class of one picture.

    Seconds for a picture of 224 pixels, EfficientNet-Lite0 and 32 steps on two busy CPU cores: Grad-CAM 0.1, integrated
    gradients 2, blurred 2, guided 3, XRAI 6, its fast variant 4; the first picture takes some 3 more, as gradients are traced.

    Args:
      model: the classifier.
      image_bytes: an encoded image, as it would be sent to `serving_default`.
      method: one of `METHODS`.
      class_index: of the class, in [0, num_classes); None for the most probable one.
      baseline: the picture that is explained against; without effect on Grad-CAM, and `blurred` for blur integrated gradients.
      num_steps: gradients between the baseline and the picture, in [2, `MAX_STEPS`]; without effect on Grad-CAM.
      num_noisy_copies: of SmoothGrad: the attribution is the mean over so many copies of the picture with noise, each as
        slow as a picture; 0 for none. The completeness gap grows, as the copies are other pictures. Not for Grad-CAM.

    Raises:
      InputError: if the bytes are no image, an argument is out of its range, or the model lacks what Grad-CAM needs.

    Sources: Sundararajan et al., "Axiomatic attribution for deep networks", https://arxiv.org/abs/1703.01365; Xu et al.,
    "Attribution in scale and space", https://arxiv.org/abs/2004.03383; Kapishnikov et al., "Guided integrated gradients",
    https://arxiv.org/abs/2106.09788, and "XRAI", https://arxiv.org/abs/1906.02825; Selvaraju et al., "Grad-CAM",
    https://arxiv.org/abs/1610.02391; Smilkov et al., "SmoothGrad", https://arxiv.org/abs/1706.03825
    """
    check_settings(method, baseline=baseline, num_steps=num_steps, num_noisy_copies=num_noisy_copies)
    try:
        (image,) = model.preprocess([image_bytes])
    except tf.errors.InvalidArgumentError as error:
        raise InputError(
            f"Expected an image that TensorFlow decodes, such as JPEG or PNG. Received: {len(image_bytes):,} bytes that are "
            "none. Send the bytes of an image file."
        ) from error
    (probabilities,) = model.probabilities(image[np.newaxis])
    if class_index is None:
        class_index = int(probabilities.argmax())
    model.check_class(class_index)
    if method == "grad_cam":
        attribution = grad_cam(model, image, class_index)
        return Explanation(method, class_index, probabilities, None, attribution, None, None, {})
    start = make_baseline(image, baseline, method=method)
    path_method = "integrated_gradients" if method in ("xrai", "xrai_fast") else method
    attribution = _smoothed(
        model, image, class_index, method=path_method, start=start, num_steps=num_steps, num_noisy_copies=num_noisy_copies
    )
    start_probability = float(model.probabilities(start[np.newaxis])[0, class_index])
    gap = abs(float(attribution.sum(dtype=np.float64)) - (float(probabilities[class_index]) - start_probability))
    regions = None
    if path_method != method:
        attribution, regions = _xrai(image, attribution, is_fast=method == "xrai_fast")
    parameters = {"baseline": baseline, "num_steps": num_steps, "num_noisy_copies": num_noisy_copies}
    return Explanation(
        method=method,
        class_index=class_index,
        probabilities=probabilities,
        baseline_probability=start_probability,
        attribution=attribution,
        completeness_gap=gap,
        regions=regions,
        parameters=parameters,
    )


def check_settings(method: str, *, baseline: str, num_steps: int, num_noisy_copies: int) -> None:
    """Checks what `explain` is given beside the model and the picture.

    Raises:
      InputError: if a value is out of its range, or does not go with the method.
    """
    if method not in METHODS:
        raise InputError(f"Expected `method` to be one of {', '.join(METHODS)}. Received: method={method!r}.")
    if baseline not in BASELINES:
        raise InputError(f"Expected `baseline` to be one of {', '.join(BASELINES)}. Received: baseline={baseline!r}.")
    if method == "blur_integrated_gradients" and baseline != "blurred":
        raise InputError(
            f"Expected `baseline` of blurred with {method}, whose way begins there. Received: baseline={baseline!r}. "
            "Leave it out, or take integrated_gradients."
        )
    if not 2 <= num_steps <= MAX_STEPS:
        raise InputError(
            f"Expected `num_steps` in [2, {MAX_STEPS}]. Received: num_steps={num_steps}. Use {DEFAULT_STEPS}, or more where "
            "the completeness gap is large."
        )
    largest = 0 if method == "grad_cam" else MAX_NOISY_COPIES
    if not 0 <= num_noisy_copies <= largest:
        raise InputError(
            f"Expected `num_noisy_copies` in [0, {largest}] with {method}. Received: num_noisy_copies={num_noisy_copies}. "
            "Use 0, or 10 with the integrated gradients."
        )


def integrated_gradients(
    model: ExplainableModel, image_bytes: bytes, class_index: int, *, num_steps: int = DEFAULT_STEPS
) -> np.ndarray:
    """Shares the probability of a class out among the pixels of an image: what each added to it, or took from it.

    The values add up to the difference between the probability for the image and that for its blurred copy, the baseline; how
    closely, depends on `num_steps`. On the default data's eight most confident mistakes the median gap was 0.05 with 32 steps
    (the largest 0.68) and 0.09 with 64 (0.17).

    Args:
      model: the classifier.
      image_bytes: an encoded image.
      class_index: of the class to be explained, in [0, num_classes).
      num_steps: images between the baseline and the image, both included, at which the gradient is taken; at least 2.

    Returns:
      float32 [height, width] of the network's input; positive where a pixel speaks for the class.

    Raises:
      InputError: if there is no such class, `num_steps` is out of its range, or the bytes are no image.
    """
    explanation = explain(model, image_bytes, method="integrated_gradients", class_index=class_index, num_steps=num_steps)
    return explanation.heat_map


def make_baseline(image: np.ndarray, baseline: Baseline, *, method: Method = "integrated_gradients") -> np.ndarray:
    """Makes the picture that another is explained against.

    Args:
      image: float32 [height, width, 3] in [0, 255].
      baseline: `blurred`, `black`, `white`, or `mean`, the picture's mean colour.
      method: blur integrated gradients blur as their library does, which takes the outside of the picture for black.

    Returns:
      float32 [height, width, 3] in [0, 255].
    """
    if method == "blur_integrated_gradients":
        return gaussian_blur(image, _max_sigma(image))
    if baseline == "blurred":
        return blurred(image)
    if baseline == "mean":
        return np.broadcast_to(image.mean(axis=(0, 1)), image.shape).astype(np.float32)
    return np.full_like(image, 0 if baseline == "black" else 255)


def blurred(image: np.ndarray) -> np.ndarray:
    """Blurs float32 [height, width, 3] as the default baseline is, by `BLUR` of each side."""
    height, width, _ = image.shape
    return ndimage.gaussian_filter(image, (BLUR * height, BLUR * width, 0), mode="nearest")


def _max_sigma(image: np.ndarray) -> float:
    return BLUR * max(image.shape[:2])


def _smoothed(
    model: ExplainableModel,
    image: np.ndarray,
    class_index: int,
    *,
    method: Method,
    start: np.ndarray,
    num_steps: int,
    num_noisy_copies: int,
) -> np.ndarray:
    """Gives float32 [height, width, 3], the mean over noisy copies where there are any.

    Not by the library's own `GetSmoothedMask`, whose noise comes from NumPy's global state, which threads share.
    """
    if not num_noisy_copies:
        return _integrate(model, image, class_index, method=method, start=start, num_steps=num_steps)
    random = np.random.default_rng(0)
    total = np.zeros(image.shape, np.float64)
    for _ in range(num_noisy_copies):
        noisy = image + random.normal(0, NOISE * np.ptp(image), image.shape)
        total += _integrate(model, noisy.astype(np.float32), class_index, method=method, start=start, num_steps=num_steps)
    return (total / num_noisy_copies).astype(np.float32)


def _integrate(
    model: ExplainableModel, image: np.ndarray, class_index: int, *, method: Method, start: np.ndarray, num_steps: int
) -> np.ndarray:
    """Integrates the gradient along the way from the start to the image: float32 [height, width, 3]."""

    def differentiate(images: np.ndarray, call_model_args: None, expected_keys: Sequence[str]) -> dict[str, np.ndarray]:
        return {saliency.INPUT_OUTPUT_GRADIENTS: model.gradients(images, class_index)}

    batch_size = max(1, min(num_steps, _MAX_PIXELS_PER_BATCH // (image.shape[0] * image.shape[1])))
    # In float64: the library compares sums of absolute differences to nine digits, and divides differences by 0.01.
    image, start = image.astype(np.float64), start.astype(np.float64)
    if method == "blur_integrated_gradients":
        found = saliency.BlurIG().GetMask(
            image, differentiate, max_sigma=_max_sigma(image), steps=num_steps, batch_size=batch_size
        )
    elif method == "guided_integrated_gradients":
        found = saliency.GuidedIG().GetMask(image, differentiate, x_baseline=start, x_steps=num_steps)
    else:
        found = saliency.IntegratedGradients().GetMask(
            image, differentiate, x_baseline=start, x_steps=num_steps, batch_size=batch_size
        )
    return found.astype(np.float32)


def _xrai(image: np.ndarray, attribution: np.ndarray, *, is_fast: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gathers the attribution of pixels in regions of the picture: float32 and int32 [height, width], see `Explanation`."""
    # A picture of one colour has one region; the library would stretch what rounding has left of differences.
    segments = [np.ones(image.shape[:2], bool)] if np.ptp(image) < 1 else None
    # The library takes the largest of a pixel's three colours, and so something for the class from every pixel. Of three that
    # are their sum it takes the sum, and the values of the regions add up as those of the pixels do.
    summed = np.broadcast_to(attribution.sum(axis=-1, keepdims=True), attribution.shape)
    found = saliency.XRAI().GetMaskWithDetails(
        image,
        call_model_function=None,  # the attribution is here already
        base_attribution=summed,
        segments=segments,
        extra_parameters=saliency.XRAIParameters(
            algorithm="fast" if is_fast else "full", return_xrai_segments=True, flatten_xrai_segments=True
        ),
    )
    return found.attribution_mask.astype(np.float32), found.segments.astype(np.int32)


def grad_cam(model: ExplainableModel, image: np.ndarray, class_index: int) -> np.ndarray:
    """Adds up the Grad-CAM of each feature map that the head reads.

    Coarse, and blind to one thing: a map's weights are its slopes' means over all positions, and those of a standard deviation
    or a covariance are zero in the mean, so only what the head reads of means and maxima shows. On ten flowers the probability
    fell by 0.13 where the tenth of the picture that the map marks was blurred, by 0.09 with the last map alone, by 0.03 for a
    random tenth, and by 0.17 with XRAI.

    Args:
      model: the classifier, with the signatures of its halves.
      image: float32 [height, width, 3] in [0, 255].
      class_index: of the class, in [0, num_classes).

    Returns:
      float32 [height, width]; in the logarithm of the odds per pixel, to the first order, 0 or more.

    Raises:
      InputError: if the model has no such signatures.
    """
    height, width, _ = image.shape
    total = np.zeros((height, width), np.float32)
    for values, gradients in model.feature_map_gradients(image, class_index).values():
        found = {
            saliency.CONVOLUTION_LAYER_VALUES: values[np.newaxis],
            saliency.CONVOLUTION_OUTPUT_GRADIENTS: gradients[np.newaxis],
        }
        coarse = saliency.GradCam().GetMask(
            image, lambda *_, found=found, **__: dict(found), should_resize=False, three_dims=False
        )
        # Stretched so that its sum stays: a cell of a coarse map counts for as much as it covers.
        total += resize(coarse, (height, width), order=1, mode="edge") * (coarse.size / total.size)
    return total
