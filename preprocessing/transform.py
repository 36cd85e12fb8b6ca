"""`preprocessing_fn`, the Transform component's entry: what becomes of a record before the network sees it.

No analyzer is used, so Transform only traces this graph and never reads the images; the graph then runs inside training,
evaluation and serving alike.
"""

from typing import Any

import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY, transformed_name
from preprocessing.images import decode_images


def preprocessing_fn(inputs: dict[str, tf.Tensor], custom_config: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Decodes the image and turns the label into its place in the class list.

    Args:
      inputs: features of a batch of records, scalars: string or int64 [batch].
      custom_config: `image_size` in pixels and `class_names`, the ordered class list.

    Returns:
      `image_xf`: float32 [batch, image_size, image_size, 3], RGB in [0, 255]; `label_xf`: int64 [batch], in
      [0, num_classes), or -1 for a label that is not in the list.
    """
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(
            tf.constant(custom_config["class_names"]), tf.range(len(custom_config["class_names"]), dtype=tf.int64)
        ),
        default_value=-1,
    )
    return {
        transformed_name(IMAGE_KEY): decode_images(inputs[IMAGE_KEY], image_size=custom_config["image_size"]),
        transformed_name(LABEL_KEY): table.lookup(inputs[LABEL_KEY]),
    }
