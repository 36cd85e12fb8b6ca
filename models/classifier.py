"""The classifier: a frozen backbone's feature maps, pooled, and a head on them. Pure Keras.

The two halves are built apart, as the trainer runs every image through the first once and trains the second on what came
out, and joined for the export.
"""

from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np
import pydantic

from models.backbones import BACKBONES


class ModelConfig(pydantic.BaseModel):
    """The network.

    Attributes:
      backbone: name in `models.backbones.BACKBONES`.
      weights: `imagenet`, or `random` for tests of the plumbing.
      num_feature_maps: how many of the backbone's feature maps are pooled, counted from the last; middle ones see
        texture that the last has given up for objects.
      dropout: share of the head's inputs left out in training, in [0, 1).
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backbone: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: Literal["imagenet", "random"] = "imagenet"
    num_feature_maps: int = pydantic.Field(5, ge=1, le=8)
    dropout: float = pydantic.Field(0.5, ge=0, lt=1)


def build_embedding(config: ModelConfig, *, image_size: int) -> keras.Model:
    """Builds the frozen half: an image becomes the average and the maximum of each channel of several feature maps.

    Args:
      config: backbone, weights and how many feature maps.
      image_size: side of the input in pixels.

    Returns:
      A model float32 [batch, image_size, image_size, 3] in [0, 255] -> float32 [batch, num_features].
    """
    backbone = BACKBONES[config.backbone]
    network = backbone.build(image_size=image_size, fold_batch_norm=True)
    if config.weights == "imagenet":
        backbone.load_imagenet(network)
    network.trainable = False
    pooled = []
    for feature_map in network.outputs[-config.num_feature_maps :]:
        pooled.append(keras.layers.GlobalAveragePooling2D(dtype="float32")(feature_map))
        pooled.append(keras.layers.GlobalMaxPooling2D(dtype="float32")(feature_map))
    return keras.Model(network.inputs, keras.layers.Concatenate(dtype="float32")(pooled), name="embedding")


def build_head(config: ModelConfig, *, mean: np.ndarray, variance: np.ndarray, num_classes: int) -> keras.Model:
    """Builds the trained half.

    Args:
      config: dropout.
      mean: float [num_features], of the training embeddings.
      variance: float [num_features], of the training embeddings.
      num_classes: number of classes.

    Returns:
      A model float32 [batch, num_features] -> logits float32 [batch, num_classes].
    """
    embedding = keras.Input((len(mean),), name="embedding")
    x = keras.layers.Normalization(mean=mean, variance=variance, dtype="float32")(embedding)
    x = keras.layers.Dropout(config.dropout, dtype="float32")(x)
    logits = keras.layers.Dense(num_classes, dtype="float32", kernel_initializer="zeros", name="logits")(x)
    return keras.Model(embedding, logits, name="head")


def join(embedding: keras.Model, head: keras.Model) -> keras.Model:
    """Joins the halves: float32 [batch, image_size, image_size, 3] -> probabilities float32 [batch, num_classes]."""
    logits = head(embedding.output)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    return keras.Model(embedding.inputs, probabilities, name="classifier")


def class_weights(label_counts: Sequence[int]) -> list[float]:
    """Weighs each class by the inverse of its frequency; the mean weight of an image is 1.

    Args:
      label_counts: number of training images of each class.

    Raises:
      ValueError: if a class has none.
    """
    if min(label_counts) == 0:
        raise ValueError(f"Expected training images of every class. Received: label_counts={list(label_counts)}.")
    total = sum(label_counts)
    return [total / (len(label_counts) * count) for count in label_counts]
