"""The parts of the OpenAPI document that say what a body looks like; FastAPI adds the paths.

Bodies are read with limits of our own, so FastAPI sees no types of them. Called by `models.application`.
"""

from typing import Any, get_args

from models.attributions import BASELINES, Method
from models.signatures import IMAGE_BYTES, SERVING_DEFAULT

_BYTES = {
    "type": "object",
    "required": ["b64"],
    "additionalProperties": False,
    "properties": {"b64": {"type": "string", "format": "byte", "description": "base64 of an image file"}},
}
_NAMED_BYTES = {
    "type": "object",
    "required": [IMAGE_BYTES],
    "additionalProperties": False,
    "properties": {IMAGE_BYTES: _BYTES},
}
_ROW = {"anyOf": [_NAMED_BYTES, _BYTES]}
_COLUMN = {"type": "array", "minItems": 1, "items": _BYTES}
_PREDICTION = {
    "type": "object",
    "required": ["label", "probability", "labels", "probabilities"],
    "properties": {
        "label": {"type": "string"},
        "probability": {"type": "number"},
        "labels": {"type": "array", "items": {"type": "string"}},
        "probabilities": {"type": "array", "items": {"type": "number"}},
    },
}
_PREDICTIONS = {"type": "array", "items": _PREDICTION}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_ERRORS = {
    400: "what was sent is no request for this model",
    404: "another model or version",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "the queue is full",
    503: "no model is ready yet",
    504: "the answer took too long",
}


def predict(is_versioned: bool) -> dict[str, Any]:
    """Describes `:predict`."""
    by_row = {"type": "object", "required": ["predictions"], "properties": {"predictions": _PREDICTIONS}}
    by_column = {"type": "object", "required": ["outputs"], "properties": {"outputs": {"type": "object"}}}
    return _operation(is_versioned, "Classes of images", {"anyOf": [by_row, by_column]}, parameters={"type": "object"})


def explain(is_versioned: bool) -> dict[str, Any]:
    """Describes `:explain`."""
    parameters = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "method": {"enum": list(get_args(Method))},
            "label": {"type": "string"},
            "baseline": {"enum": list(BASELINES)},
            "num_steps": {"type": "integer", "minimum": 2},
            "num_noisy_copies": {"type": "integer", "minimum": 0},
            "overlay": {"type": "boolean"},
            "feature_attributions": {"type": "boolean"},
        },
    }
    answer = {
        "type": "object",
        "required": ["explanations", "predictions"],
        "properties": {
            "explanations": {"type": "array", "items": {"type": "object", "required": ["attributions"]}},
            "predictions": _PREDICTIONS,
        },
    }
    return _operation(is_versioned, "Why the model says so", answer, parameters=parameters)


def status(is_versioned: bool) -> dict[str, Any]:
    """Describes the status of the versions."""
    item = {"type": "object", "required": ["version", "state", "status"]}
    properties = {"model_version_status": {"type": "array", "items": item}}
    answer = {"type": "object", "required": ["model_version_status"], "properties": properties}
    return _operation(is_versioned, "States of the versions", answer)


def metadata(is_versioned: bool) -> dict[str, Any]:
    """Describes the metadata."""
    answer = {"type": "object", "required": ["model_spec", "metadata"]}
    return _operation(is_versioned, "Signatures of the model", answer)


def health() -> dict[str, Any]:
    """Describes the health route."""
    return _operation(False, "Whether a model is ready", {"type": "object", "required": ["status"]})


def _operation(
    is_versioned: bool, summary: str, answer: dict[str, Any], *, parameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describes one operation; those that take `parameters` take images."""
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "done", "content": _json(answer)}}
        | {str(code): {"description": description, "content": _json(_ERROR)} for code, description in _ERRORS.items()},
    }
    if is_versioned:
        schema = {"type": "string", "pattern": "^[0-9]{1,19}$"}
        operation["parameters"] = [{"name": "version", "in": "path", "required": True, "schema": schema}]
    if parameters is not None:
        common = {"signature_name": {"const": SERVING_DEFAULT}, "parameters": parameters}
        rows = {"instances": {"type": "array", "minItems": 1, "items": _ROW}}
        named = {
            "type": "object",
            "required": [IMAGE_BYTES],
            "properties": {IMAGE_BYTES: _COLUMN},
            "additionalProperties": False,
        }
        columns = {"inputs": {"anyOf": [named, _COLUMN]}}
        body = {
            "anyOf": [
                {"type": "object", "required": ["instances"], "properties": common | rows, "not": {"required": ["inputs"]}},
                {"type": "object", "required": ["inputs"], "properties": common | columns, "not": {"required": ["instances"]}},
            ]
        }
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
