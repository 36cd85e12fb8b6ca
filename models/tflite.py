"""The trained classifier as TFLite models, for the phone and the edge. Optional; called by the trainer at its end.

`model_float16.tflite` halves the weights and takes float32 images. `model_int8.tflite` computes the backbone and the projection
in integers, the statistics and the head in float, and takes uint8 images, as a camera gives them. Both give float32
probabilities, in the order of `labels.txt`. Neither decodes nor resizes: whoever feeds them must do it as the Transform graph.

What integers lose depends on the data: little on the flowers, nearly everything on ELPV (README has the figures), so compare
before shipping `int8`. The activations lose most; with 8 bits for the weights alone, the statistics were five times closer to
those in float.

TensorFlow 2.21 still has all of `tf.lite` that is used here, and calls its interpreter deprecated in favour of the package
`ai-edge-litert`, which runs the same files.
"""

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
import pydantic
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from models.classifier import StatisticsPooling

logger = logging.getLogger("tfx_vision")

TfliteKind = Literal["float16", "int8"]
IMAGE = "image"
PROBABILITIES = "probabilities"
NUM_CALIBRATION_IMAGES = 100  # TensorFlow's guide to quantization asks for some 100 to 500
MIN_AGREEMENT = 0.95  # of a model's answers with the network's, below which the log warns
_MAX_PIXEL = 255

# What stays in float in an `int8` model: 1% of the multiply-adds of the default network. A covariance near zero has a large
# square root, and quantized it is zero. With all in integers, 98.1% of the flowers' answers stayed the same, so 98.9%; and the
# integer square root aborts the process for some networks, where TFLite prepares it.
_FLOAT_LAYERS = (StatisticsPooling, keras.layers.Concatenate, keras.layers.Softmax, keras.Model)

# Of 2.19 and later; by its text, as it is a plain UserWarning. See the module's docstring.
warnings.filterwarnings("ignore", message=r"\s*Warning: tf\.lite\.Interpreter is deprecated")


class ExportConfig(pydantic.BaseModel):
    """What is exported beside the SavedModel.

    Attributes:
      tflite: kinds of TFLite model: `float16` for half the size at the same answers, `int8` for a quarter of the size and for
        hardware that is fast in integers, at a loss of accuracy that depends on the data.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    tflite: tuple[TfliteKind, ...] = ()


def export_tflite(
    network: keras.Model,
    folder: str,
    *,
    kinds: Sequence[TfliteKind],
    calibration_images: Iterable[np.ndarray],
    class_names: Sequence[str],
) -> dict[str, str]:
    """Converts a network and writes `model_<kind>.tflite` for each kind, whole or not at all.

    The models take one image at a time, [1, image_size, image_size, 3]: phones classify one image, and a batch of unknown size
    keeps TFLite from planning its memory and its delegates from taking the graph. `int8` quantizes weights and activations
    after training, with the ranges that the calibration images show. Its image is uint8, which needs no conversion on a phone,
    and its probabilities are float32, as 256 steps are few for the softmax's small ones.

    Args:
      network: float32 [batch, image_size, image_size, 3], RGB in [0, 255] -> probabilities float32 [batch, classes].
      folder: where to write; made where it is missing; local or gs://.
      kinds: which models.
      calibration_images: float32 [image_size, image_size, 3] in [0, 255] each, as the network will see them; some 100, of all
        classes. Read for `int8` only.
      class_names: in the order of the network's outputs.

    Returns:
      Kind -> path of its file.

    Raises:
      ValueError: if a kind is unknown, the class names are not as many as the outputs, or `int8` has no calibration image.
    """
    if unknown := sorted(set(kinds) - set(get_args(TfliteKind))):
        raise ValueError(
            f"Expected kinds of {', '.join(get_args(TfliteKind))}. Received: {', '.join(unknown)}. Leave them out."
        )
    if len(class_names) != network.output_shape[-1]:
        raise ValueError(
            f"Expected a class name for each output of the network, {network.output_shape[-1]}. "
            f"Received: {len(class_names)} class names. Take those that it was trained with."
        )
    tf.io.gfile.makedirs(folder)
    paths = {}
    for kind in dict.fromkeys(kinds):
        logger.info("converting the model to TFLite, %s", kind)
        content = _convert_float16(network) if kind == "float16" else _convert_int8(network, calibration_images)
        path = os.path.join(folder, f"model_{kind}.tflite")
        with tf.io.gfile.GFile(f"{path}.tmp", "wb") as file:
            file.write(content)
        tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)
        share = integer_share(content)
        logger.info("%s: %.1f MB, %.1f%% of the multiply-adds in integers", path, len(content) / 1e6, 100 * share)
        paths[kind] = path
    return paths


def _convert_float16(network: keras.Model) -> bytes:
    converter = _converter(network, tf.float32)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


def _convert_int8(network: keras.Model, calibration_images: Iterable[np.ndarray]) -> bytes:
    images = [np.clip(np.rint(image), 0, _MAX_PIXEL).astype(np.uint8)[np.newaxis] for image in calibration_images]
    if not images:
        raise ValueError("Expected calibration images for `int8`. Received: none. Give some 100 training images.")
    converter = _converter(network, tf.uint8)
    in_float = _names_in_float(network, converter.convert())
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image] for image in images)
    # The debugger is the one way to a quantized model that leaves some operations in float; nothing is debugged.
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter,
        debug_dataset=converter.representative_dataset,
        debug_options=tf.lite.experimental.QuantizationDebugOptions(denylisted_nodes=in_float),
    )
    return debugger.get_nondebug_quantized_model()


def _names_in_float(network: keras.Model, content: bytes) -> list[str]:
    """Returns the names of the tensors, in a TFLite model without quantization, that `_FLOAT_LAYERS` compute."""
    layers = [re.escape(layer.name) for layer in network.layers if isinstance(layer, _FLOAT_LAYERS)]
    if not layers:
        return []
    # A tensor is named for the layer's path, whose parts Keras numbers where it calls a layer again: classifier_1/head_1/...
    is_in_float = re.compile(rf"/(?:{'|'.join(layers)})(?:_\d+)?/")
    tensors = tf.lite.Interpreter(model_content=content).get_tensor_details()
    return [tensor["name"] for tensor in tensors if is_in_float.search(tensor["name"])]


def _converter(network: keras.Model, image_dtype: tf.DType) -> tf.lite.TFLiteConverter:
    """Traces the network for one image, with its weights as constants.

    The converter of TensorFlow 2.16 aborts the process where it finds Keras 3's variables in the graph:
    https://github.com/tensorflow/tensorflow/issues/63987
    """
    spec = tf.TensorSpec((1, *network.input_shape[1:]), image_dtype, name=IMAGE)
    traced = tf.function(lambda image: network(tf.cast(image, tf.float32), training=False), autograph=False)
    frozen = convert_variables_to_constants_v2(traced.get_concrete_function(spec))
    # Once more, as freezing loses the names of the signature.
    named = tf.function(lambda image: {PROBABILITIES: frozen(image)[0]}, autograph=False)
    return tf.lite.TFLiteConverter.from_concrete_functions([named.get_concrete_function(spec)], tf.Module())


def integer_share(content: bytes) -> float:
    """Returns the share of a TFLite model's multiply-adds that are computed in integers, in [0, 1].

    Counted are convolutions, dense layers and products of matrices; 0 for a model without any.
    """
    interpreter = tf.lite.Interpreter(
        model_content=content,
        # Delegates would hide which operations they run.
        experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    in_integers = total = 0
    # The one way to the operations in Python; TensorFlow's own QuantizationDebugger goes it too.
    for operation in interpreter._get_ops_details():
        count = _count_multiply_adds(operation, tensors)
        total += count
        if count and tensors[operation["inputs"][0]]["dtype"] == np.int8:
            in_integers += count
    return in_integers / total if total else 0.0


def _count_multiply_adds(operation: Mapping[str, Any], tensors: Mapping[int, Mapping[str, Any]]) -> int:
    name = operation["op_name"]
    if name not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL"):
        return 0
    first, second = (tensors[index]["shape"].tolist() for index in operation["inputs"][:2])
    output = tensors[operation["outputs"][0]]["shape"].tolist()
    if name == "BATCH_MATMUL":  # [batch, rows, inner] by [batch, inner, columns]; either may be stored transposed
        return math.prod(output) * math.prod(first) // math.prod(output[:-1])
    # The kernel meets each position of the output once; a dense layer has one.
    positions = math.prod(output[1:3]) if name != "FULLY_CONNECTED" else math.prod(output[:-1])
    return positions * math.prod(second)


def evaluate_tflite(
    path: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, num_threads: int = 2
) -> tuple[float, np.ndarray]:
    """Runs a TFLite model on labelled images.

    Args:
      path: of the model; local or gs://.
      batches: float32 [batch, image_size, image_size, 3] in [0, 255] and int labels [batch].
      num_threads: of the interpreter.

    Returns:
      The accuracy in [0, 1], and the probabilities, float32 [num_images, classes].

    Raises:
      ValueError: if there is no image.
    """
    classify = _load(path, num_threads=num_threads)
    probabilities, labels = [], []
    for images, batch_labels in batches:
        probabilities.append(classify(np.asarray(images)))
        labels.append(np.asarray(batch_labels))
    if not labels:
        raise ValueError("Expected images to evaluate on. Received: none.")
    all_probabilities = np.concatenate(probabilities)
    return float(np.mean(all_probabilities.argmax(axis=-1) == np.concatenate(labels))), all_probabilities


def compare_tflite(
    network: keras.Model,
    paths: Mapping[str, str],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    num_threads: int = 2,
) -> dict[str, dict[str, float]]:
    """Compares TFLite models with the network that they were made of, and warns of one that often disagrees.

    Reads the images once.

    Args:
      network: as for `export_tflite`.
      paths: what `export_tflite` returned.
      batches: as for `evaluate_tflite`.
      num_threads: of the interpreter.

    Returns:
      For each kind, ready for JSON: `accuracy` and `network_accuracy` in [0, 1], of the TFLite model and of the network;
      `agreement`, the share of images that both give the same class; `max_difference`, the largest between two probabilities of
      a class; `num_images`; `bytes`, the size of the file; `integer_share`, see there.

    Raises:
      ValueError: if there is no image.
    """
    classifiers = {kind: _load(path, num_threads=num_threads) for kind, path in paths.items()}
    hits, agreements, differences = (dict.fromkeys(paths, 0.0) for _ in range(3))
    num_images = num_network_hits = 0
    for images, labels in batches:
        images, labels = np.asarray(images), np.asarray(labels)
        expected = np.asarray(network(images, training=False))
        num_images += len(labels)
        num_network_hits += int(np.sum(expected.argmax(axis=-1) == labels))
        for kind, classify in classifiers.items():
            found = classify(images)
            hits[kind] += float(np.sum(found.argmax(axis=-1) == labels))
            agreements[kind] += float(np.sum(found.argmax(axis=-1) == expected.argmax(axis=-1)))
            differences[kind] = max(differences[kind], float(np.abs(found - expected).max()))
    if not num_images:
        raise ValueError("Expected images to compare on. Received: none.")
    report = {}
    for kind, path in paths.items():
        content = _read(path)
        report[kind] = {
            "accuracy": hits[kind] / num_images,
            "network_accuracy": num_network_hits / num_images,
            "agreement": agreements[kind] / num_images,
            "max_difference": differences[kind],
            "num_images": num_images,
            "bytes": len(content),
            "integer_share": integer_share(content),
        }
        if report[kind]["agreement"] < MIN_AGREEMENT:
            logger.warning(
                "%s gives another answer than the network for %.1f%% of %d images; accuracy %.1f%%, the network's %.1f%%",
                path,
                100 * (1 - report[kind]["agreement"]),
                num_images,
                100 * report[kind]["accuracy"],
                100 * report[kind]["network_accuracy"],
            )
    return report


def _load(path: str, *, num_threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function float32 [batch, image_size, image_size, 3] in [0, 255] -> float32 [batch, classes]."""
    interpreter = tf.lite.Interpreter(model_content=_read(path), num_threads=num_threads)
    interpreter.allocate_tensors()
    (image,), (probabilities,) = interpreter.get_input_details(), interpreter.get_output_details()

    def classify(images: np.ndarray) -> np.ndarray:
        if image["dtype"] == np.uint8:
            images = np.clip(np.rint(images), 0, _MAX_PIXEL)
        rows = []
        for one in images.astype(image["dtype"]):
            interpreter.set_tensor(image["index"], one[np.newaxis])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(probabilities["index"])[0])
        return np.stack(rows)

    return classify


def _read(path: str) -> bytes:
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()
