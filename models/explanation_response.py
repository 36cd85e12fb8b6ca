"""What `:explain` answers, in the format of Vertex AI's explanations, and what it may be asked.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/Explanation. Called by `models.application`, in a thread of its own:
an explanation takes the time of a hundred predictions.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from PIL import Image

from data.errors import InputError
from models.attributions import DEFAULT_STEPS, Baseline, Explanation, Method, check_settings, explain
from models.overlay import overlay
from models.payloads import RequestError
from models.signatures import IMAGE_BYTES, PROBABILITIES
from models.versions import ServedModel

_DIGITS = 5  # significant, of an attribution's values
_OVERLAY_SIDE = 640  # pixels, at most


class ExplanationParameters(pydantic.BaseModel):
    """The `parameters` of a request to `:explain`.

    Attributes:
      method: see `models.attributions`.
      label: class to be explained; the most probable one where left out.
      baseline: picture that the image is explained against.
      num_steps: gradients between the baseline and the image.
      num_noisy_copies: of SmoothGrad; 0 for none.
      overlay: whether the heat map is drawn, too: a PNG as a data URI, in `overlay` beside the attributions.
      feature_attributions: whether the values of all pixels are in the answer.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Method = "integrated_gradients"
    label: Annotated[str, pydantic.Field(max_length=1000)] | None = None
    baseline: Baseline = "blurred"
    num_steps: int = DEFAULT_STEPS
    num_noisy_copies: int = 0
    overlay: bool = True
    feature_attributions: bool = True


class AbandonedError(Exception):
    """Nobody waits for the explanation any more."""


def read_parameters(values: dict[str, Any], labels: Sequence[str], *, max_gradients: int) -> ExplanationParameters:
    """Checks what a client asks for.

    Args:
      values: the request's `parameters`.
      labels: the model's classes.
      max_gradients: that an explanation may take.

    Raises:
      RequestError: 400.
    """
    try:
        parameters = ExplanationParameters.model_validate(values)
        check_settings(
            parameters.method,
            baseline=parameters.baseline,
            num_steps=parameters.num_steps,
            num_noisy_copies=parameters.num_noisy_copies,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part)[:40] for part in first["loc"])
        known = ", ".join(ExplanationParameters.model_fields)
        message = f"Expected `parameters.{name}` to be valid. Received: {repr(first['input'])[:60]}. {first['msg']}."
        raise RequestError(400, f"{message} Known are {known}.") from error
    except InputError as error:
        raise RequestError(400, str(error)) from error
    num_gradients = parameters.num_steps * max(1, parameters.num_noisy_copies)
    if num_gradients > max_gradients:
        raise RequestError(
            400,
            f"Expected {max_gradients} gradients or fewer. Received: {num_gradients:,} (num_steps x num_noisy_copies). "
            "Ask for fewer.",
        )
    if parameters.label is not None and parameters.label not in labels:
        raise RequestError(
            400,
            f"Expected `parameters.label` to be one of {', '.join(labels[:20])}. Received: {parameters.label[:60]!r}. "
            "Leave it out for the most probable class.",
        )
    return parameters


def explain_images(
    model: ServedModel,
    images: Sequence[bytes],
    parameters: ExplanationParameters,
    *,
    is_abandoned: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Explains images one after the other; only one thread at a time may.

    Args:
      model: that is served.
      images: JPEG or PNG bytes, which it has answered before.
      parameters: of the request.
      is_abandoned: is asked between gradients.

    Returns:
      Vertex AI's `Explanation` of each.

    Raises:
      RequestError: 400, if the model cannot be explained so.
      AbandonedError: if nobody waits.
    """

    def stop_if_abandoned(num_gradients: int = 0) -> None:
        if is_abandoned():
            raise AbandonedError

    stop_if_abandoned()
    found = []
    try:
        explainer = model.explainer()
        explainer.on_gradients = stop_if_abandoned
        for image in images:
            explanation = explain(
                explainer,
                image,
                method=parameters.method,
                class_index=None if parameters.label is None else model.labels.index(parameters.label),
                baseline=parameters.baseline,
                num_steps=parameters.num_steps,
                num_noisy_copies=parameters.num_noisy_copies,
            )
            found.append(_describe(explanation, image, model.labels, parameters))
    except InputError as error:
        raise RequestError(400, str(error)) from error
    return found


def _describe(
    explanation: Explanation, image: bytes, labels: Sequence[str], parameters: ExplanationParameters
) -> dict[str, Any]:
    attribution: dict[str, Any] = {
        "instanceOutputValue": explanation.probability,
        "outputIndex": [explanation.class_index],
        "outputDisplayName": labels[explanation.class_index],
        "outputName": PROBABILITIES,
        "featureAttributions": {},
    }
    if explanation.baseline_probability is not None:
        attribution["baselineOutputValue"] = explanation.baseline_probability
    if explanation.approximation_error is not None:
        attribution["approximationError"] = float(explanation.approximation_error)
    if parameters.feature_attributions:
        attribution["featureAttributions"][IMAGE_BYTES] = _round(explanation.heat_map)
    if parameters.overlay:
        attribution["overlay"] = "data:image/png;base64," + _draw(image, explanation.heat_map)
    return {"attributions": [attribution]}


def _round(values: np.ndarray) -> list[list[float]]:
    """Rounds to significant digits, or a map of 224 pixels' side has a megabyte of JSON."""
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in values.tolist()]


def _draw(image: bytes, heat_map: np.ndarray) -> str:
    picture = Image.open(io.BytesIO(image), formats=("JPEG", "PNG"))
    picture.draft("RGB", (_OVERLAY_SIDE, _OVERLAY_SIDE))  # a JPEG is decoded smaller at once
    picture.thumbnail((_OVERLAY_SIDE, _OVERLAY_SIDE))
    buffer = io.BytesIO()
    overlay(picture.convert("RGB"), heat_map).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
