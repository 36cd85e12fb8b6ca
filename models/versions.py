"""The model that is served: loaded, warmed up and checked before it answers, and replaced when a newer version appears.

A serving folder has a folder for each version, named by a number, as TensorFlow Serving reads it. Called by
`models.application`.
"""

import dataclasses
import functools
import io
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from data.errors import InputError
from data.inspection import UnusableImageError, is_remote, shorten
from models.explainable import ExplainableModel
from models.signatures import IMAGE_BYTES, PROBABILITIES, SERVING_DEFAULT

SAVED_MODEL_FILE = "saved_model.pb"
LOADING, AVAILABLE, END = "LOADING", "AVAILABLE", "END"  # TensorFlow Serving's states
_OUTPUTS = ("label", "probability", "labels", PROBABILITIES)
_CHECKED_SIDES = ((300, 300), (64, 96))  # height and width, pixels
_SUM_TOLERANCE = 1e-3
_MAX_SHOWN = 16  # versions, beside those that failed and are still there

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of one image: of each class its probability, in the order of `ServedModel.labels`."""

    label: str
    probability: float
    probabilities: list[float]


class ServedModel:
    """One version of an exported classifier."""

    def __init__(self, folder: str, *, version: int):
        """Loads a SavedModel; `warm_up` makes it ready.

        Args:
          folder: of the SavedModel; gs:// is copied to a temporary folder first.
          version: its number.

        Raises:
          InputError: if it cannot be loaded, or is no classifier of this project.
        """
        self.version = version
        self._copy = None
        if is_remote(folder):
            self._copy = tempfile.TemporaryDirectory(prefix="served_model_")  # goes when this object goes
            _copy_folder(folder, self._copy.name)
            folder = self._copy.name
        self.folder = folder
        try:
            self._model = tf.saved_model.load(folder)  # kept, as its variables go with it
            self.signature_defs = _read_signature_defs(folder)
        except Exception as error:  # of files of anyone's making
            raise InputError(
                f"Expected a SavedModel in {folder!r}. Received: one that cannot be loaded: "
                f"{shorten(str(error)) or type(error).__name__}. Push it again."
            ) from error
        function = self._model.signatures.get(SERVING_DEFAULT)
        inputs = function.structured_input_signature[1] if function else {}
        missing = [name for name in _OUTPUTS if function and name not in function.structured_outputs]
        if set(inputs) != {IMAGE_BYTES} or missing:
            raise InputError(
                f"Expected {folder!r} to have a signature `{SERVING_DEFAULT}` of `{IMAGE_BYTES}` that gives "
                f"{', '.join(_OUTPUTS)}. Received: {', '.join(self._model.signatures) or 'no signature'}. Take a model of this "
                "pipeline."
            )
        self._function = function
        self._explainer_lock = threading.Lock()
        self.labels: list[str] = []

    @functools.cached_property
    def _explainer(self) -> ExplainableModel:
        return ExplainableModel(self.folder)

    def explainer(self) -> ExplainableModel:
        """Loads the model once more, with gradients, on the first call.

        Raises:
          InputError: if the model cannot be explained.
        """
        with self._explainer_lock:
            return self._explainer

    def warm_up(self, max_batch_size: int) -> None:
        """Answers images of our own making in batches of growing size, and checks what the model says.

        TensorFlow prepares its kernels on the first call. Sizes in between cost no more when they come first: measured, within
        the noise, so nothing is padded to a size of these.

        Raises:
          InputError: if an answer is none of a classifier.
        """
        images = _example_images()
        size = 1
        while size <= max_batch_size:
            batch = [images[position % len(images)] for position in range(size)]
            raw = self._call(batch)
            probabilities = raw[PROBABILITIES]
            sums = probabilities.sum(axis=-1)
            labels = [name.decode("utf-8", "replace") for name in raw["labels"][0]]
            is_right = (
                probabilities.shape == raw["labels"].shape == (size, len(labels))
                and len(raw["label"]) == len(raw["probability"]) == size
                and np.isfinite(probabilities).all()
                and np.abs(sums - 1).max() <= _SUM_TOLERANCE
                and all(name in raw["labels"][0] for name in raw["label"])
            )
            if not is_right:
                raise InputError(
                    f"Expected version {self.version} to give a probability for each class, 1 in all. Received: "
                    f"{probabilities[0][:5].tolist()} for {labels[:5]}. Train it again."
                )
            self.labels = labels
            size *= 2

    def answer(self, images: Sequence[bytes]) -> list[Answer | UnusableImageError]:
        """Answers a batch; an image that cannot be decoded spoils no other.

        Args:
          images: JPEG or PNG bytes.
        """
        try:
            return self._rows(images)
        except tf.errors.InvalidArgumentError:
            answers: list[Any] = [_decoding_error(image) for image in images]
        good = [position for position, error in enumerate(answers) if error is None]
        try:
            rows = self._rows([images[position] for position in good]) if good else []
        except tf.errors.InvalidArgumentError:
            rows = [self._answer_alone(images[position]) for position in good]
        for position, row in zip(good, rows, strict=True):
            answers[position] = row
        return answers

    def _answer_alone(self, image: bytes) -> Answer | UnusableImageError:
        try:
            return self._rows([image])[0]
        except tf.errors.InvalidArgumentError as error:
            return UnusableImageError(f"the model refuses it: {_reason(error)}")

    def _rows(self, images: Sequence[bytes]) -> list[Answer]:
        raw = self._call(images)
        names = [name.decode("utf-8", "replace") for name in raw["label"]]
        values = raw["probability"].tolist(), raw[PROBABILITIES].tolist()
        return [Answer(*row) for row in zip(names, *values, strict=True)]

    def _call(self, images: Sequence[bytes]) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._function(**{IMAGE_BYTES: tf.constant(list(images))}).items()}


@dataclasses.dataclass(frozen=True, slots=True)
class VersionState:
    """What became of a version: its state, as TensorFlow Serving names it, and why, where it failed."""

    state: str
    error: str = ""


class ModelVersions:
    """Keeps the newest version that works."""

    def __init__(self, model: str, *, max_batch_size: int, on_change: Callable[[ServedModel], None] = lambda model: None):
        """Remembers where to look; `poll` looks.

        Args:
          model: folder of numbered versions, or of one SavedModel; local or gs://.
          max_batch_size: up to which a version is warmed up.
          on_change: is given each new version before it is served, in the thread that polls.
        """
        self._folder = model.rstrip("/")
        self._max_batch_size = max_batch_size
        self._on_change = on_change
        self._failed: dict[int, Any] = {}
        self.current: ServedModel | None = None
        self.states: dict[int, VersionState] = {}

    def poll(self) -> bool:
        """Loads a version that is newer than the current one, if there is one that works; the newest first.

        One that does not work is logged, skipped, and not tried again until its files change.

        Returns:
          Whether the version changed.

        Raises:
          InputError: if there is none at all and has never been one.
        """
        found = self.find()
        for version in [version for version in self._failed if version not in found]:
            del self._failed[version], self.states[version]
        for version in sorted(found, reverse=True):
            if self.current and version <= self.current.version:
                break
            fingerprint = _fingerprint(found[version])
            if version in self._failed and self._failed[version] == fingerprint:
                continue
            if self._try(version, found[version]):
                return True
            self._failed[version] = fingerprint
        if self.current is None:
            if self._failed:
                raise InputError(self.states[max(self._failed)].error)
            raise InputError(
                f"Expected a SavedModel, or numbered folders with one each, in {self._folder!r}. Received: none. "
                "Give --model the serving_model folder of a run."
            )
        return False

    def find(self) -> dict[int, str]:
        """Returns the folders of the complete versions by number; half-written ones lack `saved_model.pb`."""
        try:
            if tf.io.gfile.exists(f"{self._folder}/{SAVED_MODEL_FILE}"):
                name = os.path.basename(self._folder)
                return {int(name) if _is_version(name) else 1: self._folder}
            names = [name.rstrip("/") for name in tf.io.gfile.listdir(self._folder)]
            return {
                int(name): f"{self._folder}/{name}"
                for name in names
                if _is_version(name) and tf.io.gfile.exists(f"{self._folder}/{name}/{SAVED_MODEL_FILE}")
            }
        except tf.errors.NotFoundError:
            return {}
        except tf.errors.OpError as error:
            if self.current is None:
                raise InputError(
                    f"Expected {self._folder!r} to be readable. Received: {shorten(error.message)}. Give another --model."
                ) from error
            _logger.warning("cannot look for versions: %s", shorten(error.message))
            return {}

    def _try(self, version: int, folder: str) -> bool:
        self.states[version] = VersionState(LOADING)
        try:
            model = ServedModel(folder, version=version)
            model.warm_up(self._max_batch_size)
            self._on_change(model)
        except Exception as error:  # whatever it is, the version that answers now stays
            reason = shorten(str(error)) or type(error).__name__
            self.states[version] = VersionState(END, reason)
            _logger.error("version %d is skipped: %s", version, reason)
            return False
        previous, self.current = self.current, model
        self.states[version] = VersionState(AVAILABLE)
        if previous:
            self.states[previous.version] = VersionState(END)
            for old in sorted(set(self.states) - set(self._failed))[:-_MAX_SHOWN]:
                del self.states[old]
        _logger.info("version %d is served", version)
        return True


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 19


def _fingerprint(folder: str) -> Any:
    """Tells whether the files of a version have changed: their names, sizes and times."""
    files = []
    try:
        for parent, _, names in tf.io.gfile.walk(folder):
            for name in names:
                status = tf.io.gfile.stat(os.path.join(parent, name))
                files.append((parent, name, status.length, status.mtime_nsec))
    except tf.errors.OpError:
        return None  # they are changing
    return sorted(files)


def _copy_folder(source: str, target: str) -> None:
    for parent, _, names in tf.io.gfile.walk(source):
        inside = parent.rstrip("/")[len(source.rstrip("/")) :].strip("/")
        os.makedirs(os.path.join(target, inside), exist_ok=True)
        for name in names:
            tf.io.gfile.copy(os.path.join(parent, name), os.path.join(target, inside, name), overwrite=True)


def _read_signature_defs(folder: str) -> dict[str, Any]:
    """Reads the signatures as TensorFlow Serving's metadata shows them."""
    document = saved_model_pb2.SavedModel()
    with open(os.path.join(folder, SAVED_MODEL_FILE), "rb") as file:
        document.ParseFromString(file.read())
    return {
        name: {
            "inputs": {key: _describe(info) for key, info in signature.inputs.items()},
            "outputs": {key: _describe(info) for key, info in signature.outputs.items()},
            "method_name": signature.method_name,
        }
        for name, signature in document.meta_graphs[0].signature_def.items()
    }


def _describe(info: Any) -> dict[str, Any]:
    dimensions = [{"size": str(dimension.size), "name": dimension.name} for dimension in info.tensor_shape.dim]
    return {
        "dtype": types_pb2.DataType.Name(info.dtype),
        "tensor_shape": {"dim": dimensions, "unknown_rank": info.tensor_shape.unknown_rank},
        "name": info.name,
    }


def _example_images() -> list[bytes]:
    """Makes a JPEG in colour and a grey PNG."""
    random = np.random.default_rng(0)
    encoded = []
    for (height, width), image_format in zip(_CHECKED_SIDES, ("JPEG", "PNG"), strict=True):
        buffer = io.BytesIO()
        shape = (height, width, 3) if image_format == "JPEG" else (height, width)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(buffer, image_format)
        encoded.append(buffer.getvalue())
    return encoded


def _decoding_error(image: bytes) -> UnusableImageError | None:
    try:
        tf.io.decode_image(image, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError as error:
        return UnusableImageError(f"it is damaged or cut off: {_reason(error)}")
    return None


def _reason(error: tf.errors.InvalidArgumentError) -> str:
    return shorten(error.message.rpartition("}}")[2]) or "no reason given"
