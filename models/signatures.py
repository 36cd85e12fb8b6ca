"""The signatures of the exported SavedModel, all of them roads through one graph: decode, resize, network.

Whatever calls the model (the server, the Evaluator, an explanation) runs the Transform graph that training ran. Called by
the trainer at its end.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY, transformed_name
from preprocessing.transform import TransformGraph

SERVING_DEFAULT = "serving_default"
EXAMPLES = "examples"
TRANSFORM_FEATURES = "transform_features"
EXPLAIN_PREPROCESS = "explain_preprocess"
EXPLAIN_MODEL = "explain_model"

IMAGE_BYTES = "image_bytes"  # TensorFlow Serving and Vertex AI decode {"b64": ...} for names that end in `_bytes`
PROBABILITIES = "probabilities"


class ImageClassifier(tf.Module):
    """The network with its preprocessing and its class list, as one exportable object."""

    def __init__(self, network: keras.Model, transform: TransformGraph, class_names: Sequence[str]):
        """Wraps a network.

        Args:
          network: float32 [batch, image_size, image_size, 3] in [0, 255] -> probabilities float32 [batch, classes].
          transform: the graph that training ran.
          class_names: in the order of the network's outputs.
        """
        super().__init__(name="image_classifier")
        self.network = network
        self.transform_images = transform.images
        self.transform_labels = transform.labels
        self.class_names = tf.constant(list(class_names))
        # In the order in which a run that starts from this model sets them; a loaded network has no order of its own.
        self.network_weights = [weight.value for weight in network.weights]
        # Traced once and called by every signature. Nothing here needs AutoGraph, which would take longer than the rest.
        images = tf.TensorSpec(network.input_shape, tf.float32)
        self._predict = tf.function(lambda x: network(x, training=False), autograph=False).get_concrete_function(images)

    def _preprocess(self, image_bytes: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(self.transform_images(image_bytes), self.network.input_shape)

    def _answer(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = self._predict(images)
        best = tf.argmax(probabilities, axis=-1)
        return {
            "label": tf.gather(self.class_names, best),
            "probability": tf.reduce_max(probabilities, axis=-1),
            "labels": tf.tile(self.class_names[tf.newaxis], [tf.shape(probabilities)[0], 1]),
            PROBABILITIES: probabilities,
        }

    def signatures(self) -> dict[str, tf.types.experimental.ConcreteFunction]:
        """Traces the signatures, ready for `tf.saved_model.save`.

        `serving_default` takes image_bytes string [batch]; `examples` and `transform_features` take serialized
        tf.Example string [batch]; `explain_preprocess` takes image bytes and gives float32 images, which
        `explain_model` takes.
        """
        strings = tf.TensorSpec([None], tf.string)

        @tf.function(autograph=False)
        def serving_default(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._answer(self._preprocess(image_bytes))

        @tf.function(autograph=False)
        def examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
            parsed = tf.io.parse_example(examples, {IMAGE_KEY: tf.io.FixedLenFeature([], tf.string)})
            return self._answer(self._preprocess(parsed[IMAGE_KEY]))

        @tf.function(autograph=False)
        def transform_features(examples: tf.Tensor) -> dict[str, tf.Tensor]:
            # The label alone: the Evaluator needs no second decoding of the image.
            parsed = tf.io.parse_example(examples, {LABEL_KEY: tf.io.FixedLenFeature([], tf.string)})
            return {transformed_name(LABEL_KEY): self.transform_labels(parsed[LABEL_KEY])}

        @tf.function(autograph=False)
        def explain_preprocess(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"images": self._preprocess(image_bytes)}

        @tf.function(autograph=False)
        def explain_model(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return {PROBABILITIES: self._predict(images)}

        images = tf.TensorSpec(self.network.input_shape, tf.float32)
        return {
            SERVING_DEFAULT: serving_default.get_concrete_function(tf.TensorSpec([None], tf.string, name=IMAGE_BYTES)),
            EXAMPLES: examples.get_concrete_function(strings),
            TRANSFORM_FEATURES: transform_features.get_concrete_function(strings),
            EXPLAIN_PREPROCESS: explain_preprocess.get_concrete_function(strings),
            EXPLAIN_MODEL: explain_model.get_concrete_function(images),
        }


def export(classifier: ImageClassifier, path: str) -> None:
    """Saves the classifier with its signatures.

    Args:
      classifier: what to save.
      path: folder of the SavedModel; local or gs://.
    """
    tf.saved_model.save(classifier, path, signatures=classifier.signatures())
