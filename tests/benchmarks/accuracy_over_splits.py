"""Measures the test accuracy of stage one over several random splits, as one split of a small set says little.

    python tests/benchmarks/accuracy_over_splits.py --data elpv
    python tests/benchmarks/accuracy_over_splits.py --data elpv --set model.backbone=efficientnet_lite2

Every image passes through the frozen backbone once; for each split the projection and the head are then trained anew by the
trainer's own functions, and judged on the test split that they have not seen. About two minutes for 2,600 images on two cores.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from data.features import SPLITS, TEST_SPLIT, TRAIN_SPLIT, VALID_SPLIT
from data.inspection import ImageLimits, inspect_image
from data.sources import open_source
from data.splits import SplitConfig, choose_group_split, choose_split, find_near_duplicates
from models.classifier import build_head, build_statistics, fit_projection
from models.devices import configure_devices
from models.embeddings import PROJECTION_SAMPLE, Embeddings
from models.head import train_head
from pipeline.config import load_config
from preprocessing.images import decode_image

_BATCH_SIZE = 32


def main() -> None:
    """Runs the benchmark and prints a line for each split."""
    parser = argparse.ArgumentParser(description="Measures the test accuracy over several random splits.")
    parser.add_argument("--data", default="elpv", help="folder per class, CSV or `elpv`")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; repeatable")
    arguments = parser.parse_args()
    config = load_config(overrides=arguments.set)
    source = open_source(arguments.data)
    devices = configure_devices(config.devices)
    spec = config.input_spec
    network = build_statistics(config.model, image_size=spec.image_size)
    compute = tf.function(lambda images: network(images, training=False), autograph=False)
    paths = [reference.path for reference in source.references]
    images = tf.data.Dataset.from_tensor_slices(paths).map(
        lambda path: decode_image(tf.io.read_file(path), image_size=spec.image_size, interpolation=spec.interpolation),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    statistics = np.concatenate([compute(batch).numpy() for batch in images.batch(_BATCH_SIZE).prefetch(2)])
    labels = np.array([source.class_names.index(reference.label) for reference in source.references])
    encoded = [Path(path).read_bytes() for path in paths]
    digests = [hashlib.sha256(one).hexdigest() for one in encoded]
    groups = _near_duplicates(encoded)
    accuracies, f1_scores = [], []
    for salt in range(1, arguments.splits + 1):
        keras.utils.set_random_seed(config.training.seed)
        split_config = SplitConfig(split_salt=str(salt))
        chosen = np.array([choose_split(digest, split_config) for digest in digests])
        for group in groups:
            chosen[group] = choose_group_split([digests[index] for index in group], [None] * len(group), split_config)
        rows = {split: np.flatnonzero(chosen == split) for split in SPLITS}
        sample = statistics[rows[TRAIN_SPLIT][:PROJECTION_SAMPLE]]
        projection = fit_projection(sample, num_components=config.model.num_components)
        train, valid, test = (
            Embeddings(projection(statistics[rows[split]]), labels[rows[split]])
            for split in (TRAIN_SPLIT, VALID_SPLIT, TEST_SPLIT)
        )
        head = build_head(config.model, num_components=len(projection.bias), num_classes=len(source.class_names))
        with tempfile.TemporaryDirectory() as folder:
            train_head(config.training, head, train=train, valid=valid, devices=devices, folder=folder)
        predicted = np.argmax(head.predict(test.features, verbose=0), axis=1)
        confusion = tf.math.confusion_matrix(test.labels, predicted, len(source.class_names)).numpy()
        f1 = 2 * np.diag(confusion) / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
        accuracies.append(np.trace(confusion) / confusion.sum())
        f1_scores.append(f1.mean())
        print(f"split {salt}: accuracy {accuracies[-1]:.3f}, macro F1 {f1_scores[-1]:.3f} on {len(test.labels)}", flush=True)
    error = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
    print(f"mean: accuracy {np.mean(accuracies):.3f} (standard error {error:.3f}), macro F1 {np.mean(f1_scores):.3f}")


def _near_duplicates(encoded: list[bytes]) -> list[np.ndarray]:
    """Groups images that look alike, which `data.prepare` keeps in one split."""
    images = [inspect_image(one, ImageLimits()) for one in encoded]
    hashes, thumbnails = (
        np.frombuffer(b"".join(column), np.uint8).reshape(len(images), -1)
        for column in ((image.perceptual_hash for image in images), (image.thumbnail for image in images))
    )
    return find_near_duplicates(hashes, thumbnails)


if __name__ == "__main__":
    main()
