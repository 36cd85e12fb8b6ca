"""`preprocessing_fn`, the Transform component's entry: what becomes of a record before the network sees it.

No analyzer is used, so Transform only traces this graph and never reads the images; the graph then runs inside training,
evaluation and serving alike.
"""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tensorflow_transform as tft
from tensorflow_transform import impl_helper

from data.features import IMAGE_KEY, LABEL_KEY, feature_spec, transformed_name
from preprocessing.images import InputSpec, decode_images


def preprocessing_fn(inputs: dict[str, tf.Tensor], custom_config: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Decodes the image and turns the label into its place in the class list.

    Args:
      inputs: features of a batch of records, scalars: string or int64 [batch].
      custom_config: `input`, an `InputSpec` as JSON, and `class_names`, the ordered class list.

    Returns:
      `image_xf`: float32 [batch, image_size, image_size, 3], RGB in [0, 255]; `label_xf`: int64 [batch], in
      [0, num_classes), or -1 for a label that is not in the list.
    """
    spec = InputSpec.model_validate(custom_config["input"])
    # Comparisons, not a lookup table: a graph without resources can be called and exported like any function.
    is_class = tf.equal(inputs[LABEL_KEY][:, tf.newaxis], tf.constant(list(custom_config["class_names"])))
    label = tf.where(tf.reduce_any(is_class, axis=1), tf.argmax(is_class, axis=1), tf.constant(-1, tf.int64))
    return {
        transformed_name(IMAGE_KEY): decode_images(
            inputs[IMAGE_KEY], image_size=spec.image_size, interpolation=spec.interpolation
        ),
        transformed_name(LABEL_KEY): label,
    }


def write_transform_graph(folder: str, *, spec: InputSpec, class_names: Sequence[str]) -> None:
    """Writes the graph that the Transform component writes, where no pipeline runs, as in a notebook.

    Args:
      folder: to make; `TransformGraph` loads it.
      spec: what the network's images are like.
      class_names: the ordered class list.
    """
    settings = {"input": spec.model_dump(mode="json"), "class_names": list(class_names)}
    features = feature_spec()
    # What the component itself calls where there is no analyzer.
    impl_helper.analyze_in_place(
        functools.partial(preprocessing_fn, custom_config=settings),
        force_tf_compat_v1=False,
        feature_specs=features,
        type_specs={name: tf.TensorSpec([None], feature.dtype) for name, feature in features.items()},
        transform_output_path=folder,
    )


class TransformGraph:
    """The graph that the Transform component wrote, as one function for the image and one for the label.

    Attributes:
      images: string [batch] of encoded images -> float32 [batch, image_size, image_size, 3] in [0, 255].
      labels: string [batch] -> int64 [batch], -1 for a label that is not in the class list.
    """

    def __init__(self, path: str):
        """Loads the graph.

        Args:
          path: folder of the Transform component's `transform_graph`.
        """
        layer = tft.TFTransformOutput(path).transform_features_layer()

        def function(key: str) -> tf.types.experimental.ConcreteFunction:
            # AutoGraph would spend most of the trainer's start on the Keras 2 layer that TFT gives.
            transform = tf.function(lambda value: layer({key: value})[transformed_name(key)], autograph=False)
            return transform.get_concrete_function(tf.TensorSpec([None], tf.string))

        self.images = function(IMAGE_KEY)
        self.labels = function(LABEL_KEY)
