"""The signatures of the exported SavedModel, all of them roads through one graph: decode, resize, network.

Whatever calls the model (the server, the Evaluator, an explanation) runs the Transform graph that training ran. Called by
the trainer at its end.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY, transformed_name
from models.classifier import StatisticsPooling
from preprocessing.transform import TransformGraph

SERVING_DEFAULT = "serving_default"
EXAMPLES = "examples"
TRANSFORM_FEATURES = "transform_features"
EXPLAIN_PREPROCESS = "explain_preprocess"
EXPLAIN_MODEL = "explain_model"
# The two halves of `explain_model`, of networks that have feature maps: images -> maps, maps -> probabilities.
EXPLAIN_FEATURE_MAPS = "explain_feature_maps"
EXPLAIN_HEAD = "explain_head"
# The names by which Vertex AI looks for `explain_preprocess` and `explain_model`, and no others:
# https://cloud.google.com/ai-platform/prediction/docs/ai-explanations/saving-tensorflow-models
XAI_PREPROCESS = "xai_preprocess"
XAI_MODEL = "xai_model"

IMAGE_BYTES = "image_bytes"  # TensorFlow Serving and Vertex AI decode {"b64": ...} for names that end in `_bytes`
IMAGES = "images"  # input of `explain_model` and output of `explain_preprocess`
PROBABILITIES = "probabilities"
LOGITS = "logits"


def split_at_feature_maps(classifier: keras.Model) -> tuple[keras.Model, keras.Model, list[str]] | None:
    """Splits a classifier of `join` where its feature maps are pooled; the halves share its layers.

    Args:
      classifier: images float32 [batch, image_size, image_size, 3] -> probabilities float32 [batch, num_classes].

    Returns:
      Images -> a list of feature maps float32 [batch, height, width, channels]; such a list -> probabilities and logits, both
      float32 [batch, num_classes]; and the name of each map. None where the network pools no map, as a backbone of TensorFlow
      Hub gives one vector an image, or is no network of `join`.
    """
    pools = [layer for layer in classifier.layers if isinstance(layer, StatisticsPooling)]
    if not pools or not isinstance(classifier.layers[-1], keras.layers.Softmax):
        return None
    maps = [pool.input for pool in pools]
    lower = keras.Model(classifier.inputs[0], maps, name="feature_maps_of_classifier")
    upper = keras.Model(maps, [classifier.output, classifier.layers[-1].input], name="head_of_classifier")
    return lower, upper, [pool.name.removesuffix("_pool") for pool in pools]


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
        self._trace(network)

    def _trace(self, network: keras.Model) -> None:
        """Traces the network, once for all signatures. Nothing here needs AutoGraph, which would take longer than the rest."""
        images = tf.TensorSpec(network.input_shape, tf.float32)
        self._find_maps = self._finish = None
        halves = split_at_feature_maps(network)
        if halves is None:
            self._predict = tf.function(lambda x: network(x, training=False), autograph=False).get_concrete_function(images)
            return
        lower, upper, names = halves
        # The network is exported as the one half after the other, so what an explanation sees of it is what is served, and the
        # signatures of the halves add nothing to the file.
        find = tf.function(lambda x: dict(zip(names, tf.nest.flatten(lower(x, training=False)), strict=True)), autograph=False)
        self._find_maps = find.get_concrete_function(images)
        finish = tf.function(lambda maps: upper([maps[name] for name in names], training=False), autograph=False)
        maps = {name: tf.TensorSpec(map.shape, tf.float32) for name, map in zip(names, lower.outputs, strict=True)}
        self._finish = finish.get_concrete_function(maps)
        predict = tf.function(lambda x: self._finish(self._find_maps(x))[0], autograph=False)
        self._predict = predict.get_concrete_function(images)

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
        `explain_model` takes, and so do `xai_preprocess` and `xai_model`. Where the network has feature maps,
        `explain_feature_maps` gives those of images, each by its name, and `explain_head` takes them.
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
            return {IMAGES: self._preprocess(image_bytes)}

        @tf.function(autograph=False)
        def explain_model(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return {PROBABILITIES: self._predict(images)}

        images = tf.TensorSpec(self.network.input_shape, tf.float32)
        preprocess = explain_preprocess.get_concrete_function(strings)
        predict = explain_model.get_concrete_function(images)
        return {
            SERVING_DEFAULT: serving_default.get_concrete_function(tf.TensorSpec([None], tf.string, name=IMAGE_BYTES)),
            EXAMPLES: examples.get_concrete_function(strings),
            TRANSFORM_FEATURES: transform_features.get_concrete_function(strings),
            EXPLAIN_PREPROCESS: preprocess,
            EXPLAIN_MODEL: predict,
            XAI_PREPROCESS: preprocess,
            XAI_MODEL: predict,
            **self._signatures_of_halves(),
        }

    def _signatures_of_halves(self) -> dict[str, tf.types.experimental.ConcreteFunction]:
        if self._find_maps is None:
            return {}

        @tf.function(autograph=False)
        def explain_feature_maps(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._find_maps(images)

        @tf.function(autograph=False)
        def explain_head(**maps: tf.Tensor) -> dict[str, tf.Tensor]:
            probabilities, logits = self._finish(maps)
            return {PROBABILITIES: probabilities, LOGITS: logits}

        maps = self._find_maps.structured_outputs
        specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in maps.items()}
        return {
            EXPLAIN_FEATURE_MAPS: explain_feature_maps.get_concrete_function(
                tf.TensorSpec(self.network.input_shape, tf.float32, name=IMAGES)
            ),
            EXPLAIN_HEAD: explain_head.get_concrete_function(**specs),
        }


def export(classifier: ImageClassifier, path: str) -> None:
    """Saves the classifier with its signatures.

    Args:
      classifier: what to save.
      path: folder of the SavedModel; local or gs://.
    """
    tf.saved_model.save(classifier, path, signatures=classifier.signatures())
