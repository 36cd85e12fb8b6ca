"""A trained classifier as plain arrays: what one stage hands to the next, and one run to another.

Arrays outlive the strategy and the precision that trained them, and go to a file that every worker reads. Called by the
trainer.
"""

import dataclasses
import io
import json
import logging
import os
from collections.abc import Mapping

import keras
import numpy as np
import pydantic
import tensorflow as tf

from data.errors import InputError
from models.classifier import ModelConfig, Projection, build_backbone, build_head, join, pool_statistics
from models.folding import fold_batch_norm, unfold_batch_norm
from preprocessing.images import InputSpec

logger = logging.getLogger("tfx_vision")

EXTRA_FOLDER = "assets.extra"  # SavedModel's place for files of others
NETWORK_FILE = "network.json"


class NetworkSpec(pydantic.BaseModel):
    """What the shapes of a classifier's weights, and their meaning, depend on.

    Attributes:
      class_names: the ordered class list.
      input: what the network's images are like.
      model: the network.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    class_names: tuple[str, ...]
    input: InputSpec
    model: ModelConfig

    def build_backbone(self, *, stochastic_depth: float = 0.0) -> keras.Model:
        """Builds the backbone with the weights that the settings ask for."""
        return build_backbone(self.model, image_size=self.input.image_size, stochastic_depth=stochastic_depth)

    def build_head(self, *, num_components: int) -> keras.Model:
        """Builds the head with random weights."""
        return build_head(self.model, num_components=num_components, num_classes=len(self.class_names))


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """The weights of a classifier, and how it came by them.

    Attributes:
      spec: of its network.
      backbone: weights of `NetworkSpec.build_backbone`.
      projection: of the statistics.
      head: weights of `NetworkSpec.build_head`.
      label_counts: number of training images of each class.
      history: per epoch what `models.loop.Loop.run` returns, and `stage`, the name of the stage.
    """

    spec: NetworkSpec
    backbone: list[np.ndarray]
    projection: Projection
    head: list[np.ndarray]
    label_counts: list[int]
    history: dict[str, list]

    def build_backbone(self, *, stochastic_depth: float = 0.0) -> keras.Model:
        """Builds the backbone with these weights."""
        unloaded = self.spec.model.model_copy(update={"weights": "random"})
        backbone = self.spec.model_copy(update={"model": unloaded}).build_backbone(stochastic_depth=stochastic_depth)
        backbone.set_weights(self.backbone)
        for layer in backbone.layers:
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # it computes with constants made from its weights
        return backbone

    def build_head(self) -> keras.Model:
        """Builds the head with these weights."""
        head = self.spec.build_head(num_components=len(self.projection.bias))
        head.set_weights(self.head)
        return head

    def build_for_inference(self) -> keras.Model:
        """Builds the whole network in float32, whatever trained it: images -> probabilities, see `models.classifier.join`."""
        precision = keras.mixed_precision.dtype_policy()
        keras.mixed_precision.set_dtype_policy("float32")
        try:
            statistics = pool_statistics(self.spec.model, fold_batch_norm(self.build_backbone()))
            return join(statistics, self.projection, self.build_head())
        finally:
            keras.mixed_precision.set_dtype_policy(precision)

    def write(self, path: str) -> None:
        """Writes it to a file, whole or not at all; local or gs://."""
        arrays = {f"backbone{number}": weight for number, weight in enumerate(self.backbone)}
        arrays |= {f"head{number}": weight for number, weight in enumerate(self.head)}
        rest = json.dumps({"label_counts": self.label_counts, "history": self.history})
        buffer = io.BytesIO()  # NumPy seeks in what it writes, which a bucket cannot
        np.savez(buffer, kernel=self.projection.kernel, bias=self.projection.bias, rest=rest, **arrays)
        with tf.io.gfile.GFile(f"{path}.tmp", "wb") as file:
            file.write(buffer.getvalue())
        tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)


def read_classifier(path: str, spec: NetworkSpec) -> TrainedClassifier:
    """Reads what `TrainedClassifier.write` has written."""
    with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as arrays:
        return TrainedClassifier(
            spec,
            _numbered(arrays, "backbone"),
            Projection(arrays["kernel"], arrays["bias"]),
            _numbered(arrays, "head"),
            **json.loads(str(arrays["rest"])),
        )


def _numbered(arrays: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [arrays[f"{name}{number}"] for number in range(sum(key.startswith(name) for key in arrays))]


def write_network_file(spec: NetworkSpec, model_dir: str) -> None:
    """Leaves beside an exported model what a run that starts from it must have alike."""
    with tf.io.gfile.GFile(os.path.join(model_dir, EXTRA_FOLDER, NETWORK_FILE), "w") as file:
        json.dump(_comparable(spec), file, indent=2)


def read_exported_model(path: str, spec: NetworkSpec) -> TrainedClassifier:
    """Reads the weights of an exported model, for a run to start from.

    Args:
      path: folder of the SavedModel; local or gs://.
      spec: of the network that will start from it.

    Raises:
      InputError: if it is another network.
    """
    network_file = os.path.join(path, EXTRA_FOLDER, NETWORK_FILE)
    if not tf.io.gfile.exists(network_file):
        raise InputError(
            f"Expected the latest blessed model, {path}, to say what its network is, as training.warm_start is on. Received: "
            f"no {EXTRA_FOLDER}/{NETWORK_FILE}, as in models of an earlier version. Set training.warm_start to false once."
        )
    expected = _comparable(spec)
    with tf.io.gfile.GFile(network_file) as file:
        found = json.load(file)
    if different := sorted(name for name in expected if found.get(name) != expected[name]):
        raise InputError(
            f"Expected the latest blessed model, {path}, to be the same network, as training.warm_start is on. Received: "
            f"another {', '.join(different)}. Take the settings that it was trained with, or set training.warm_start to false."
        )
    logger.info("starting from the blessed model %s", path)
    unloaded = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": "random"})})
    backbone = unloaded.build_backbone()
    folded = fold_batch_norm(backbone)
    weights = [variable.numpy() for variable in tf.saved_model.load(path).network_weights]
    folded.set_weights(weights[: len(folded.weights)])
    unfold_batch_norm(folded, backbone)
    kernel, bias, *head = weights[len(folded.weights) :]
    return TrainedClassifier(spec, backbone.get_weights(), Projection(kernel, bias), head, label_counts=[], history={})


def _comparable(spec: NetworkSpec) -> dict[str, object]:
    """Returns the settings that shape the weights; where those came from first, and dropout, do not matter."""
    model = spec.model.model_dump(mode="json", exclude={"weights", "weights_file", "dropout"})
    return model | {"image_size": spec.input.image_size, "class_names": list(spec.class_names)}
