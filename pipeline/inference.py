"""The model in Beam: images are read and looked at, RunInference asks the SavedModel, an answer or an error comes of every one.

Batch and stream share this, and `serving_default` is the signature that a server runs too, so all give the same answers. Images
travel in chunks, whose answers stay together: a chunk is what a job commits and what it need not do again. Between reading and
writing there is no shuffle, so the bytes of an image stay in one worker. Called by `pipeline.batch` and `pipeline.stream`.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import tensorflow as tf
from apache_beam.ml.inference.base import ModelHandler, RunInference

from data.errors import InputError
from data.inspection import ImageLimits, InspectedImage, UnusableImageError, inspect_image, read_file, shorten
from models.signatures import IMAGE_BYTES, SERVING_DEFAULT
from pipeline.answers import FACTS, Row, make_answer
from pipeline.inputs import InputImage
from pipeline.versions import SAVED_MODEL_FILE, latest_version

BATCH_SIZE = 64  # images that the model sees at once
_NUM_THREADS = max(2, os.cpu_count() or 2)  # decoders let go of Python's lock
_OUTPUTS = ("label", "probability", "labels", "probabilities")


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Images whose answers stay together.

    Attributes:
      name: of the chunk.
      images: to read.
    """

    name: str
    images: tuple[InputImage, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ReadChunk:
    """A chunk whose images are in memory.

    Attributes:
      name: of the chunk.
      files: where each image comes from.
      images: each as the model can take it, or the reason why it cannot.
    """

    name: str
    files: tuple[str, ...]
    images: tuple[InspectedImage | str, ...]


def find_model(folder: str) -> str:
    """Finds the SavedModel in a folder of its own or, the newest, in a folder of versions.

    Args:
      folder: local or gs://.

    Raises:
      InputError: if there is none.
    """
    folder = folder.rstrip("/")
    if tf.io.gfile.exists(os.path.join(folder, SAVED_MODEL_FILE)):
        return folder
    if tf.io.gfile.isdir(folder) and (version := latest_version(folder)):
        return os.path.join(folder, version)
    raise InputError(
        f"Expected the model to be a SavedModel or a folder of versions. Received: {folder!r}, which has neither. "
        "Give the serving_model folder of a run's workspace."
    )


class Classifier:
    """A SavedModel by its signature `serving_default`."""

    def __init__(self, folder: str):
        """Loads the model.

        Args:
          folder: of the SavedModel; local or gs://.

        Raises:
          InputError: if it does not load or has another signature.
        """
        try:
            self._model = tf.saved_model.load(folder)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise InputError(f"Expected {folder} to be a SavedModel. Received: {shorten(str(error))}. Name another.") from error
        self._predict = self._model.signatures.get(SERVING_DEFAULT) if hasattr(self._model, "signatures") else None
        inputs = self._predict.structured_input_signature[1] if self._predict else {}
        if IMAGE_BYTES not in inputs or not set(_OUTPUTS) <= set(self._predict.structured_outputs):
            raise InputError(
                f"Expected `{SERVING_DEFAULT}` of {folder} to take `{IMAGE_BYTES}` and to give {', '.join(_OUTPUTS)}. "
                f"Received: a model with {sorted(inputs) or 'no such signature'}. Export it by models.signatures."
            )

    def predict(self, images: Sequence[bytes]) -> list[Row]:
        """Predicts images, `BATCH_SIZE` at a time.

        Args:
          images: JPEG or PNG bytes.

        Returns:
          Of each its label, probability and probabilities {class: probability}, or its error.
        """
        rows = []
        for start in range(0, len(images), BATCH_SIZE):
            rows += self._predict_batch(images[start : start + BATCH_SIZE])
        return rows

    def _predict_batch(self, images: Sequence[bytes]) -> list[Row]:
        try:
            outputs = self._predict(**{IMAGE_BYTES: tf.constant(list(images), tf.string)})
        except tf.errors.InvalidArgumentError as error:
            if len(images) == 1:
                return [{"error": f"the model cannot take it: {shorten(error.message.rpartition('}}')[2])}"}]
            return [row for image in images for row in self._predict_batch([image])]  # the good ones keep their answers
        labels, probability, names, probabilities = (outputs[name].numpy() for name in _OUTPUTS)
        return [
            make_answer(labels[i].decode(), probability[i], [name.decode() for name in names[i]], probabilities[i])
            for i in range(len(images))
        ]


@functools.lru_cache(maxsize=1)
def load_classifier(folder: str, digest: str) -> Classifier:
    """Loads a model, once for all the pipelines of a process.

    Args:
      folder: of the SavedModel.
      digest: of its files, as `pipeline.model_digest` gives it; other files in the same folder are another model.
    """
    return Classifier(folder)


class ReadImages(beam.DoFn):
    """Reads the images of a `Chunk` and makes them what the model can take, as `data.prepare` does."""

    def __init__(self, limits: ImageLimits):
        self._limits = limits

    def setup(self) -> None:
        """Starts the threads."""
        self._threads = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)

    def teardown(self) -> None:
        """Stops the threads."""
        self._threads.shutdown()

    def process(self, chunk: Chunk) -> Iterator[ReadChunk]:
        """Yields the `ReadChunk`."""
        images = tuple(self._threads.map(self._read, chunk.images))
        yield ReadChunk(chunk.name, tuple(image.file for image in chunk.images), images)

    def _read(self, image: InputImage) -> InspectedImage | str:
        if image.problem:
            return image.problem
        try:
            return inspect_image(read_file(image.file) if image.encoded is None else image.encoded, self._limits)
        except UnusableImageError as error:
            return str(error)


class ClassifierHandler(ModelHandler[ReadChunk, list[Row], Classifier]):
    """RunInference's way to a `Classifier`: it takes chunks, and asks the model for the images of several of them at once."""

    def __init__(self, folder: str, *, digest: str, max_chunks: int = 1):
        """Names the model; it is loaded in the workers.

        Args:
          folder: of the SavedModel; local or gs://.
          digest: of its files.
          max_chunks: chunks that RunInference gathers; more than one helps where chunks are small.
        """
        super().__init__(min_batch_size=1, max_batch_size=max_chunks)
        self._folder = folder
        self._digest = digest

    def load_model(self) -> Classifier:
        """Loads the SavedModel."""
        return load_classifier(self._folder, self._digest)

    def run_inference(
        self, batch: Sequence[ReadChunk], model: Classifier, inference_args: dict[str, Any] | None = None
    ) -> list[tuple[str, list[Row]]]:
        """Returns for each chunk its name and, in order, a row for each image: file, facts and answer, or file and error."""
        usable = [image.encoded for chunk in batch for image in chunk.images if isinstance(image, InspectedImage)]
        answers = iter(model.predict(usable))
        results = []
        for chunk in batch:
            rows = []
            for file, image in zip(chunk.files, chunk.images, strict=True):
                if isinstance(image, InspectedImage):
                    rows.append({"file": file, **next(answers), FACTS: image.facts})
                else:
                    rows.append({"file": file, "error": image})
            results.append((chunk.name, rows))
        return results

    def get_num_bytes(self, batch: Sequence[ReadChunk]) -> int:
        """Returns the bytes of the images, for Beam's metrics, which would pickle them all to know."""
        return sum(len(image.encoded) for chunk in batch for image in chunk.images if isinstance(image, InspectedImage))

    def get_metrics_namespace(self) -> str:
        """Returns the name under which a runner's console shows the counters."""
        return "TFXVision"


class PredictImages(beam.PTransform):
    """PCollection of `Chunk` -> of (name of the chunk, a row for each of its images)."""

    def __init__(self, model: str, *, digest: str, limits: ImageLimits, max_chunks: int = 1):
        super().__init__()
        self._handler = ClassifierHandler(model, digest=digest, max_chunks=max_chunks)
        self._limits = limits

    def expand(self, chunks: beam.PCollection) -> beam.PCollection:
        """Adds the steps."""
        return chunks | "Read images" >> beam.ParDo(ReadImages(self._limits)) | "Run the model" >> RunInference(self._handler)
