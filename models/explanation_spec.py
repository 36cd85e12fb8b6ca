"""What Vertex AI must know of a model to explain it: metadata and parameters that go with a model when it is uploaded.

Vertex AI's own TensorFlow containers explain by integrated gradients or XRAI, through the signatures `xai_preprocess` and
`xai_model` and by this metadata; our server needs none of it. Plain dictionaries, which the types of
`google.cloud.aiplatform.explain` take, so that nothing here needs that package. Called by
`pipeline.model_registry`.

Google deprecated Vertex Explainable AI in March 2026 and means to end it in March 2027; the server's own `:explain` stays.

Sources: https://cloud.google.com/vertex-ai/docs/explainable-ai/configuring-explanations-feature-based;
https://cloud.google.com/ai-platform/prediction/docs/ai-explanations/saving-tensorflow-models for the signatures' names
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from data.errors import InputError
from models.attributions import BLUR, MAX_NOISY_COPIES, NOISE
from models.signatures import IMAGES, PROBABILITIES

VertexMethod = Literal["integrated_gradients", "xrai"]
VertexBaseline = Literal["blurred", "black", "white"]
FEATURE = "image"  # Vertex AI's name of the input
DEFAULT_VERTEX_STEPS = 50
_MAX_VERTEX_STEPS = 100
_MAX_GREY_LEVEL = 255.0


def explanation_metadata(class_names: Sequence[str], *, method: VertexMethod, baseline: VertexBaseline) -> dict[str, Any]:
    """Says what Vertex AI explains, and how it draws that.

    Args:
      class_names: in the order of the model's outputs.
      method: integrated gradients are drawn as pixels, for and against; XRAI as regions.
      baseline: the blurred one is a part of `explanation_parameters`.

    Returns:
      What `google.cloud.aiplatform.explain.ExplanationMetadata` takes. The tensors are the input and
      the output of the signature `xai_model`.

    Raises:
      InputError: if Vertex AI has no such method or baseline.
    """
    _check(method, baseline)
    visualization: dict[str, Any] = {"overlay_type": "GRAYSCALE", "clip_percent_upperbound": 99.5}
    if method == "integrated_gradients":
        visualization |= {"type_": "PIXELS", "polarity": "BOTH", "color_map": "PINK_GREEN", "clip_percent_lowerbound": 62.0}
    else:
        visualization |= {"polarity": "POSITIVE", "color_map": "VIRIDIS", "clip_percent_lowerbound": 62.0}
    image: dict[str, Any] = {"input_tensor_name": IMAGES, "modality": "image", "visualization": visualization}
    if baseline != "blurred":
        grey_level = 0.0 if baseline == "black" else _MAX_GREY_LEVEL
        image["input_baselines"] = [{"number_value": grey_level}]  # for every pixel and colour
    probabilities = {"output_tensor_name": PROBABILITIES, "index_display_name_mapping": list(class_names)}
    return {"inputs": {FEATURE: image}, "outputs": {PROBABILITIES: probabilities}}


def explanation_parameters(
    *,
    method: VertexMethod,
    baseline: VertexBaseline,
    image_size: int,
    num_steps: int = DEFAULT_VERTEX_STEPS,
    num_noisy_copies: int = 0,
) -> dict[str, Any]:
    """Says how Vertex AI explains: the most probable class of each picture.

    Args:
      method: of Vertex AI.
      baseline: as for `explanation_metadata`.
      image_size: side of the network's input, in pixels.
      num_steps: gradients for a picture, in [1, 100].
      num_noisy_copies: of SmoothGrad; 0 for none.

    Returns:
      What `google.cloud.aiplatform.explain.ExplanationParameters` takes.

    Raises:
      InputError: if Vertex AI does not take such a value.
    """
    _check(method, baseline)
    if not 1 <= num_steps <= _MAX_VERTEX_STEPS:
        raise InputError(
            f"Expected `num_steps` in [1, {_MAX_VERTEX_STEPS}], as Vertex AI has it. Received: num_steps={num_steps}. "
            f"Use {DEFAULT_VERTEX_STEPS}."
        )
    if not 0 <= num_noisy_copies <= MAX_NOISY_COPIES:
        raise InputError(
            f"Expected `num_noisy_copies` in [0, {MAX_NOISY_COPIES}], as Vertex AI has it. "
            f"Received: num_noisy_copies={num_noisy_copies}. Use 0."
        )
    attribution: dict[str, Any] = {"step_count": num_steps}
    if baseline == "blurred":
        attribution["blur_baseline_config"] = {"max_blur_sigma": BLUR * image_size}
    if num_noisy_copies:
        attribution["smooth_grad_config"] = {"noise_sigma": NOISE * _MAX_GREY_LEVEL, "noisy_sample_count": num_noisy_copies}
    return {f"{method}_attribution": attribution, "top_k": 1}


def _check(method: str, baseline: str) -> None:
    if method not in get_args(VertexMethod):
        raise InputError(
            f"Expected `method` to be integrated_gradients or xrai, which Vertex AI has. Received: method={method!r}. Take one."
        )
    if baseline not in get_args(VertexBaseline):
        raise InputError(
            "Expected `baseline` to be blurred, black or white, which Vertex AI can be given. "
            f"Received: baseline={baseline!r}. Take one."
        )
