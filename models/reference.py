"""Reference predictions: what the training side answers for real images, for the serving check to compare the export with.

The SavedModel holds its own copy of the preprocessing and of the weights, and either can go wrong on the way out. So the
network in memory answers here, never the exported one. Called by the trainer at its export.
"""

import os

import keras
import numpy as np
import tensorflow as tf

from data.features import FILENAME_KEY, IMAGE_KEY
from models.embeddings import Images, parse_record
from models.signatures import PROBABILITIES
from preprocessing.transform import TransformGraph

REFERENCE_FILE = "reference_predictions.tfrecord.gz"  # in the folder of the training run
NUM_REFERENCE_IMAGES = 64  # the largest batch that the serving check sends
_BATCH_SIZE = 16  # of larger images 64 would take a gigabyte


def write_reference_predictions(network: keras.Model, transform: TransformGraph, images: Images, *, folder: str) -> str:
    """Writes the first images of a split, a fair sample as records are in the order of a hash, with the network's answers.

    Takes about two seconds for 64 images of 224 pixels on two CPU cores. Computes on the CPU, as the serving check does: what a
    GPU's TF32 answers differs by about 1e-3, and would be taken for a fault of the export.

    Args:
      network: in float32: images float32 [batch, image_size, image_size, 3] in [0, 255] -> probabilities float32
        [batch, classes].
      transform: the graph that training ran.
      images: of the validation split; at most `NUM_REFERENCE_IMAGES` of them are taken.
      folder: where to write `REFERENCE_FILE`; local or gs://.

    Returns:
      The path of the file, gzipped TFRecords: each a tf.Example of `image` (the encoded bytes of the record), `filename` (of
      the record, where it has one) and `probabilities` (float32 [classes]).
    """
    path = os.path.join(folder, REFERENCE_FILE)
    with tf.device("/CPU:0"), tf.io.TFRecordWriter(f"{path}.tmp", tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
        records = tf.data.TFRecordDataset(list(images.files), "GZIP").take(NUM_REFERENCE_IMAGES)
        for batch in records.batch(_BATCH_SIZE):
            decoded, _ = parse_record(batch, transform)
            answers = np.asarray(network(decoded, training=False), np.float32)
            for record, probabilities in zip(batch.numpy(), answers, strict=True):
                writer.write(_reference(record, probabilities).SerializeToString())
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)
    return path


def _reference(record: bytes, probabilities: np.ndarray) -> tf.train.Example:
    """Takes what a prediction needs of a record, and adds the answer."""
    features = tf.train.Example.FromString(record).features.feature
    kept = {key: features[key] for key in (IMAGE_KEY, FILENAME_KEY) if key in features}
    kept[PROBABILITIES] = tf.train.Feature(float_list=tf.train.FloatList(value=probabilities))
    return tf.train.Example(features=tf.train.Features(feature=kept))
