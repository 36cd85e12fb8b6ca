"""Stage one's input: every image runs through the frozen backbone once, and what comes out is kept on disk.

The rows of a split go to files as they come, so memory does not grow with the number of images, and a killed run goes on where
it was. In a cache folder they outlive the run: a later one with the same weights, preprocessing and images finds them there.
Called by the trainer.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY
from models.classifier import Projection, fit_projection
from models.progress import Progress
from preprocessing.images import NUM_CHANNELS
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

PROJECTION_SAMPLE = 2048  # images; bounds the memory that the projection takes
_BATCH_SIZE = 32
_COUNT_BATCH_SIZE = 1024
_MAX_ENTRIES = 8  # of the cache; the ones used longest ago go
_PROJECTION_FILE = "projection.npz"
_LABELS_DTYPE = np.dtype(np.int64)
_FEATURES_DTYPE = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Images:
    """The records of one split.

    Attributes:
      split: its name.
      files: of gzipped TFRecords, in order.
      num_images: in them.
      fingerprint: hexadecimal digest of the records, in order.
    """

    split: str
    files: tuple[str, ...]
    num_images: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The projected statistics of one split, on disk: memory does not grow with the number of images.

    Attributes:
      features: float32 [num_images, num_components], mapped from its file.
      labels: int64 [num_images].
    """

    features: np.ndarray
    labels: np.ndarray


def find_images(file_patterns: list[str], *, split: str) -> Images:
    """Counts and fingerprints records without decoding their images.

    Args:
      file_patterns: patterns of gzipped TFRecord files.
      split: name of the split.

    Raises:
      ValueError: if there is no record.
    """
    files = tuple(sorted(path for pattern in file_patterns for path in tf.io.gfile.glob(pattern)))
    digest = hashlib.sha256()
    num_images = 0
    if files:
        for batch in tf.data.TFRecordDataset(list(files), "GZIP").batch(_COUNT_BATCH_SIZE).prefetch(1).as_numpy_iterator():
            for record in batch:
                digest.update(hashlib.sha256(record).digest())
            num_images += len(batch)
    if not num_images:
        raise ValueError(f"Expected images in {', '.join(file_patterns)}. Received: none.")
    return Images(split, files, num_images, digest.hexdigest())


def parse_record(serialized: tf.Tensor, transform: TransformGraph) -> tuple[tf.Tensor, tf.Tensor]:
    """Parses, decodes and resizes a batch of records.

    Args:
      serialized: tf.Example, string [batch].
      transform: the Transform graph, so that training sees what serving will.

    Returns:
      float32 [batch, image_size, image_size, 3] in [0, 255] and int64 labels [batch], -1 for one that is not in the class list.
    """
    parsed = tf.io.parse_example(serialized, {key: tf.io.FixedLenFeature([], tf.string) for key in (IMAGE_KEY, LABEL_KEY)})
    images = tf.ensure_shape(transform.images(parsed[IMAGE_KEY]), (None, None, None, NUM_CHANNELS))
    return images, transform.labels(parsed[LABEL_KEY])


def read_images(transform: TransformGraph, images: Images, *, skip: int = 0) -> tf.data.Dataset:
    """Reads, decodes and resizes records in their own order.

    Args:
      transform: the Transform graph.
      images: what to read.
      skip: records to pass over at the start, undecoded.

    Returns:
      Batches as `parse_record` gives them.
    """
    return (
        tf.data.TFRecordDataset(list(images.files), compression_type="GZIP")
        .skip(skip)
        .batch(_BATCH_SIZE)
        .map(
            tf.autograph.experimental.do_not_convert(lambda records: parse_record(records, transform)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(tf.data.AUTOTUNE)
    )


def compute_statistics(
    statistics: keras.Model, transform: TransformGraph, images: Images, *, skip: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs every image through the frozen backbone, once.

    Args:
      statistics: image -> statistics.
      transform: the Transform graph.
      images: what to run.
      skip: images to pass over at the start.

    Yields:
      float32 [batch, num_statistics] and int64 labels [batch].

    Raises:
      ValueError: if a label is not in the class list.
    """
    compute = frozen_function(statistics)
    progress = Progress(f"embedding {images.split}", total=images.num_images, done=skip)
    for batch, labels in read_images(transform, images, skip=skip):
        if tf.reduce_min(labels) < 0:
            raise ValueError("Expected labels of labels.txt only. Received: a record with another one. Prepare the data anew.")
        yield compute(batch).numpy(), labels.numpy()
        progress.advance(len(labels))


def frozen_function(network: keras.Model) -> Any:
    """Traces a network for inference alone: float32 [batch, image_size, image_size, 3] -> its output.

    The weights stay variables: as BatchNormalization is folded, oneDNN joins each convolution with its bias and activation all
    the same, and constants would save it one to two percent (`tests/benchmarks/backbone_throughput.py` measures the whole).
    """
    compute = tf.function(lambda images: network(images, training=False), autograph=False)
    return compute.get_concrete_function(tf.TensorSpec(network.input_shape, tf.float32))


def embeddings_key(weights: Sequence[np.ndarray], images: Sequence[Images], *, settings: dict[str, Any]) -> str:
    """Names the embeddings by all that they depend on.

    Args:
      weights: of the frozen network.
      images: the splits, whose records count.
      settings: whatever else they depend on, as JSON: the network, preprocessing, code. Not the network's own description, in
        which Keras numbers the layers anew each time that it builds them.

    Returns:
      32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(np.ascontiguousarray(weight).tobytes())
    digest.update(json.dumps([settings, PROJECTION_SAMPLE, [split.fingerprint for split in images]], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def embed(
    statistics: keras.Model,
    transform: TransformGraph,
    train: Images,
    valid: Images,
    *,
    num_components: int,
    folder: str,
    projection: Projection | None = None,
) -> tuple[Projection, Embeddings, Embeddings]:
    """Embeds both splits, or goes on where an earlier call in the same folder was stopped.

    Args:
      statistics: image -> statistics.
      transform: the Transform graph.
      train: the training images; the projection is fitted to the first of them, a fair sample, as records are in the order of
        a hash.
      valid: the validation images.
      num_components: of the projection, at most.
      folder: local folder for these embeddings alone, kept by the caller.
      projection: to be taken in place of a fitted one.

    Returns:
      The projection, and the embeddings of both splits.
    """
    os.makedirs(folder, exist_ok=True)
    train_batches: Iterator | None = None
    path = os.path.join(folder, _PROJECTION_FILE)
    if os.path.exists(path):
        with np.load(path) as arrays:
            projection = Projection(arrays["kernel"], arrays["bias"])
    else:
        for images in (train, valid):  # rows of another projection mean something else
            for rows in _paths(folder, images.split):
                if os.path.exists(rows):
                    os.remove(rows)
        if projection is None:
            computed = compute_statistics(statistics, transform, train)
            sample = list(_take_images(computed, PROJECTION_SAMPLE))
            logger.info("fitting the projection")
            projection = fit_projection(np.concatenate([batch for batch, _ in sample]), num_components=num_components)
            train_batches = itertools.chain(sample, computed)
        with open(f"{path}.tmp", "wb") as file:
            np.savez(file, kernel=projection.kernel, bias=projection.bias)
        os.replace(f"{path}.tmp", path)
    found = []
    for images, batches in ((train, train_batches), (valid, None)):
        done = _stored_rows(folder, images.split, len(projection.bias))
        if done < images.num_images:
            if batches is None or done:
                batches = compute_statistics(statistics, transform, images, skip=done)
            _append(folder, images.split, batches, projection)
        found.append(_open(folder, images, projection))
    return projection, *found


def _take_images(batches: Iterator[tuple[np.ndarray, np.ndarray]], num_images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Takes batches off an iterator until they hold enough images."""
    taken = 0
    while taken < num_images and (batch := next(batches, None)) is not None:
        yield batch
        taken += len(batch[1])


def _paths(folder: str, split: str) -> tuple[str, str]:
    return os.path.join(folder, f"{split}.features"), os.path.join(folder, f"{split}.labels")


def _stored_rows(folder: str, split: str, num_components: int) -> int:
    """Counts the rows that an earlier call has written whole, and cuts off what it has not."""
    sizes = dict(zip(_paths(folder, split), _row_bytes(num_components), strict=True))
    rows = min(os.path.getsize(path) // size if os.path.exists(path) else 0 for path, size in sizes.items())
    for path, size in sizes.items():
        if os.path.exists(path):
            os.truncate(path, rows * size)
    return rows


def _row_bytes(num_components: int) -> tuple[int, int]:
    return num_components * _FEATURES_DTYPE.itemsize, _LABELS_DTYPE.itemsize


def _append(folder: str, split: str, batches: Iterator[tuple[np.ndarray, np.ndarray]], projection: Projection) -> None:
    features_path, labels_path = _paths(folder, split)
    with open(features_path, "ab") as features, open(labels_path, "ab") as labels:
        for statistics, batch_labels in batches:
            features.write(projection(statistics).astype(_FEATURES_DTYPE).tobytes())
            labels.write(batch_labels.astype(_LABELS_DTYPE).tobytes())
            features.flush()
            labels.flush()


def _open(folder: str, images: Images, projection: Projection) -> Embeddings:
    features_path, labels_path = _paths(folder, images.split)
    shape = (images.num_images, len(projection.bias))
    return Embeddings(np.memmap(features_path, _FEATURES_DTYPE, "r", shape=shape), np.fromfile(labels_path, _LABELS_DTYPE))


class EmbeddingsFolder:
    """Gives embeddings a local folder: in the cache, beside a remote cache, or, without one, for this run alone.

    with EmbeddingsFolder(cache_dir, key) as folder:
        embed(..., folder=folder)
    """

    def __init__(self, cache_dir: str, key: str):
        """Names the folder.

        Args:
          cache_dir: local or gs:// folder of all embeddings; empty for none.
          key: of `embeddings_key`.
        """
        self._cache_dir = cache_dir
        self._key = key
        self._is_remote = "://" in cache_dir
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._local = ""

    def __enter__(self) -> str:
        if self._cache_dir and not self._is_remote:
            self._local = os.path.join(self._cache_dir, self._key)
            if os.path.isdir(self._local):
                os.utime(self._local)
            return self._local
        self._temporary = tempfile.TemporaryDirectory()
        self._local = self._temporary.name
        if self._is_remote and tf.io.gfile.exists(remote := os.path.join(self._cache_dir, self._key)):
            logger.info("fetching embeddings from %s", remote)
            for name in tf.io.gfile.listdir(remote):
                tf.io.gfile.copy(os.path.join(remote, name), os.path.join(self._local, name), overwrite=True)
        return self._local

    def __exit__(self, exception_type: type | None, *unused: Any) -> None:
        if exception_type is None and self._is_remote:
            remote = os.path.join(self._cache_dir, self._key)
            tf.io.gfile.makedirs(remote)
            # The projection last: without it, whoever finds the folder computes all anew.
            for name in sorted(os.listdir(self._local), key=lambda name: name == _PROJECTION_FILE):
                if not tf.io.gfile.exists(os.path.join(remote, name)):
                    tf.io.gfile.copy(os.path.join(self._local, name), os.path.join(remote, name), overwrite=True)
        if self._temporary is not None:
            self._temporary.cleanup()
        elif exception_type is None:
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        entries = [entry for entry in os.scandir(self._cache_dir) if entry.is_dir()]
        for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime)[:-_MAX_ENTRIES]:
            shutil.rmtree(entry.path, ignore_errors=True)
