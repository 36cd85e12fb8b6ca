"""How the Evaluator asks the models: TFX calls `custom_extractors`, the Evaluator's own hook, in the place of TFMA's default.

Each image goes through the `examples` signature of both models once, in batches of a size that fits any memory, and its bytes
go no further. What a model does wrong (it does not load, has other classes, answers with what is no number) becomes images
without an answer and a problem in words, so that the gate refuses it and says why, where TFMA would end in a stack trace.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow as tf
import tensorflow_model_analysis as tfma
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from tensorflow_model_analysis import constants
from tensorflow_model_analysis.extractors import extractor, features_extractor, slice_key_extractor, unbatch_extractor
from tensorflow_model_analysis.proto import config_pb2
from tensorflow_model_analysis.utils import model_util

from data.features import (
    BRIGHTNESS_GROUP,
    BRIGHTNESS_KEY,
    FILENAME_KEY,
    HEIGHT_KEY,
    IMAGE_KEY,
    LABEL_KEY,
    LABELS_FILE,
    SIZE_GROUP,
    WIDTH_KEY,
)
from data.sources import read_lines
from models.signatures import EXAMPLES, PROBABILITIES
from models.trained import EXTRA_FOLDER
from pipeline.counts import NO_ANSWER
from pipeline.metrics import ANSWERS_KEY
from pipeline.serving_process import first_line

_BATCH_SIZE = 64  # images that a model sees at once
_MIN_PROBABILITY = 1e-7  # in a log loss, as in Keras
_EXAMPLES_INPUT = "examples"  # of the signature, as `models.signatures` names it
_CANDIDATE, _BASELINE = "candidate", "baseline"

Answer = Callable[[Sequence[bytes]], np.ndarray]


class _UnusableModelError(Exception):
    """A model cannot be asked; the message says why, with "it" for the model."""


def custom_extractors(
    eval_shared_model: Any, eval_config: config_pb2.EvalConfig, tensor_adapter_config: Any
) -> list[extractor.Extractor]:
    """Returns the extractors: features, answers, slices. TFX calls it.

    Args:
      eval_shared_model: TFMA's model or models, of which only names and paths are used.
      eval_config: as `pipeline.evaluation` made it.
      tensor_adapter_config: how the records are read.
    """
    models = model_util.verify_and_update_eval_shared_models(eval_shared_model)
    settings = json.loads(
        next(metric.config for spec in eval_config.metrics_specs for metric in spec.metrics if metric.class_name == "Judgement")
    )
    return [
        features_extractor.FeaturesExtractor(
            eval_config=eval_config, tensor_representations=tensor_adapter_config.tensor_representations
        ),
        extractor.Extractor(
            stage_name="AskTheModels",
            ptransform=beam.ParDo(
                AskModels(
                    {model.model_name: model.model_path for model in models},
                    class_names=settings["class_names"],
                    dark_below=settings["dark_below"],
                    small_side=settings["small_side"],
                )
            ),
        ),
        unbatch_extractor.UnbatchExtractor(),
        slice_key_extractor.SliceKeyExtractor(eval_config=eval_config, materialize=False),
    ]


@beam.typehints.with_input_types(tfma.types.Extracts)
@beam.typehints.with_output_types(tfma.types.Extracts)
class AskModels(beam.DoFn):
    """Adds what each model answers to a batch of examples: TFMA's labels and predictions, and our `answers`."""

    def __init__(self, models: Mapping[str, str], *, class_names: Sequence[str], dark_below: float, small_side: int):
        """Takes the models.

        Args:
          models: TFMA's name -> folder of the SavedModel. The only one is the candidate; of two it is not `baseline`.
          class_names: the ordered class list.
          dark_below: mean grey value in [0, 1] below which an image is dark.
          small_side: pixels that the shorter side of an image has at least, or it is small.
        """
        self._models = dict(models)
        self._class_names = list(class_names)
        self._dark_below = dark_below
        self._small_side = small_side
        self._unusable: dict[str, str] = {}  # a model's folder -> why it cannot be asked

    def start_bundle(self) -> None:
        """Begins to collect."""
        self._waiting: list[dict[str, Any]] = []

    def process(self, extracts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields batches with what was added, and without the bytes of their images.

        TFX's reader gives batches of what it takes for a good size, here of one to eight images; they wait for company.
        """
        self._waiting.append(extracts)
        if sum(len(one[constants.INPUT_KEY]) for one in self._waiting) >= _BATCH_SIZE:
            yield self._answer_waiting()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Yields what is left."""
        if self._waiting:
            window = GlobalWindow()
            yield WindowedValue(self._answer_waiting(), window.max_timestamp(), [window])

    def _answer_waiting(self) -> dict[str, Any]:
        waiting, self._waiting = self._waiting, []
        features = {
            name: np.concatenate([np.asarray(one[constants.FEATURES_KEY][name]) for one in waiting])
            for name in waiting[0][constants.FEATURES_KEY]
            if name != IMAGE_KEY
        }
        records = [record for one in waiting for record in one[constants.INPUT_KEY]]
        labels = np.asarray([self._class_names.index(_text(label)) for label in features[LABEL_KEY]])
        probabilities, problems = {}, {}
        for name, path in self._models.items():
            probabilities[name], problems[name] = self._ask(path, records)
        features |= self._groups(features)
        return {
            constants.FEATURES_KEY: features,
            constants.LABELS_KEY: labels if len(self._models) == 1 else dict.fromkeys(self._models, labels),
            constants.PREDICTIONS_KEY: next(iter(probabilities.values())) if len(self._models) == 1 else probabilities,
            ANSWERS_KEY: self._answers(labels, probabilities, problems, features[FILENAME_KEY]),
        }

    def _ask(self, path: str, records: Sequence[bytes]) -> tuple[np.ndarray, str]:
        """Returns probabilities float32 [records, classes], zeros where there is no answer, and what the problem is."""
        found = np.zeros((len(records), len(self._class_names)), np.float32)
        if path in self._unusable:  # one image without an answer refuses a model; to load it anew for each batch takes minutes
            return found, self._unusable[path]
        try:
            answer = _load(path, tuple(self._class_names))
        except _UnusableModelError as error:
            self._unusable[path] = str(error)
            return found, str(error)
        problem = ""
        for start in range(0, len(records), _BATCH_SIZE):
            batch = slice(start, start + _BATCH_SIZE)
            try:
                found[batch] = answer(records[batch])
            except _UnusableModelError as error:
                self._unusable[path] = str(error)
                return found, str(error)
            except Exception as error:  # whatever the graph does with an image
                problem = f"it fails on an image: {first_line(error)}"
                found[batch] = _answer_one_by_one(answer, records[batch], len(self._class_names))
        is_number = np.isfinite(found).all(axis=1)
        if not is_number.all():
            problem = problem or "its answers are not numbers"
        found = np.where(is_number[:, None], found, 0).astype(np.float32)
        return found, problem if (found.sum(axis=1) <= 0).any() else ""

    def _groups(self, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns features to slice by that are made of the image's facts."""
        sides = np.minimum(np.ravel(features[HEIGHT_KEY]), np.ravel(features[WIDTH_KEY]))
        groups = {
            BRIGHTNESS_GROUP: np.where(np.ravel(features[BRIGHTNESS_KEY]) < self._dark_below, b"dark", b"normal"),
            SIZE_GROUP: np.where(sides < self._small_side, b"small", b"normal"),
        }
        return {name: group.astype(object) for name, group in groups.items()}

    def _answers(
        self,
        labels: np.ndarray,
        probabilities: Mapping[str, np.ndarray],
        problems: Mapping[str, str],
        filenames: Sequence[Any],
    ) -> dict[str, np.ndarray]:
        """Returns what `Counts.add` takes, each [batch]."""
        baseline = _BASELINE if len(self._models) > 1 else None
        (candidate,) = [name for name in self._models if name != baseline]
        rows = np.arange(len(labels))

        def classes(values: np.ndarray) -> np.ndarray:
            return np.where(values.sum(axis=1) > 0, values.argmax(axis=1), NO_ANSWER)

        def losses(values: np.ndarray) -> np.ndarray:
            return -np.log(np.clip(values[rows, labels].astype(np.float64), _MIN_PROBABILITY, 1))

        ours = probabilities[candidate]
        theirs = probabilities[baseline] if baseline else np.zeros_like(ours)
        return {
            "label": labels,
            _CANDIDATE: classes(ours),
            _BASELINE: classes(theirs),
            "confidence": ours.max(axis=1),
            f"{_CANDIDATE}_loss": losses(ours),
            f"{_BASELINE}_loss": losses(theirs) if baseline else np.zeros(len(labels)),
            "filename": np.asarray([_text(name) for name in filenames], object),
            f"{_CANDIDATE}_problem": np.asarray([problems[candidate]] * len(labels), object),
            f"{_BASELINE}_problem": np.asarray([problems[baseline] if baseline else ""] * len(labels), object),
        }


@functools.lru_cache(maxsize=2)
def _load(path: str, class_names: tuple[str, ...]) -> Answer:
    """Loads a model once in this process.

    Returns:
      Serialized examples -> probabilities float32 [batch, classes] in the order of `class_names`.

    Raises:
      _UnusableModelError: if it cannot be asked; not kept, as a bucket may answer the next time.
    """
    if not tf.io.gfile.exists(path):
        raise _UnusableModelError("it is gone from its place")
    try:
        names = read_lines(os.path.join(path, EXTRA_FOLDER, LABELS_FILE))
        model = tf.saved_model.load(path)
    except Exception as error:  # whatever is wrong with the files
        raise _UnusableModelError(f"it does not load: {first_line(error)}") from error
    if EXAMPLES not in model.signatures:
        raise _UnusableModelError(f"it has no signature `{EXAMPLES}`")
    signature = model.signatures[EXAMPLES]
    _, inputs = signature.structured_input_signature
    if list(inputs) != [_EXAMPLES_INPUT] or PROBABILITIES not in signature.structured_outputs:
        raise _UnusableModelError(
            f"its signature `{EXAMPLES}` takes {', '.join(inputs)} and gives {', '.join(signature.structured_outputs)}; it has "
            f"to take {_EXAMPLES_INPUT} and give {PROBABILITIES}"
        )
    if sorted(names) != sorted(class_names):
        raise _UnusableModelError(f"its classes are {', '.join(names)}; those of the data are {', '.join(class_names)}")
    order = [names.index(name) for name in class_names]

    def answer(records: Sequence[bytes]) -> np.ndarray:
        values = model.signatures[EXAMPLES](**{_EXAMPLES_INPUT: tf.constant(records)})[PROBABILITIES].numpy()
        if values.shape != (len(records), len(names)):
            raise _UnusableModelError(f"it answers with {values.shape[-1]} probabilities; its class list has {len(names)}")
        return values[:, order]

    return answer


def _answer_one_by_one(answer: Answer, records: Sequence[bytes], num_classes: int) -> np.ndarray:
    found = np.zeros((len(records), num_classes), np.float32)
    for row, record in enumerate(records):
        try:
            found[row] = answer([record])[0]
        except Exception:  # an image without an answer
            continue
    return found


def _text(value: Any) -> str:
    """Returns a string feature of one example, however TFMA holds it."""
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
