"""Measures stage one against plain Keras: `model.fit` on images in folders, with a frozen backbone, paired in one run.

    python tests/benchmarks/keras_fit.py                              # ELPV, 10 epochs: 12 minutes on two busy cores
    python tests/benchmarks/keras_fit.py --data photos/ --epochs 5 --rounds 3

The other side is Keras's guide of transfer learning, on `keras.utils.image_dataset_from_directory`: EfficientNet-Lite0 with the
same ImageNet weights and `trainable = False`, pooling, dropout, one dense layer, Adam, batches of 32; without XLA, which is
many times slower on a CPU, and with the same oneDNN kernels. Ours is what the trainer calls: the records are counted and read,
every image is embedded once with the default statistics, the projection is fitted and the head trained for as many epochs.
Both decode, resize, train on the same images and validate on the same others after every epoch, with a backbone that is built
before the clock starts. Not timed either: our preparation of the data, from whose records the other side's folder per class is
written, and Transform's tracing.

Prints seconds, seconds an epoch, training images a second (images times epochs over seconds) and the validation accuracy, so
that nobody is faster by learning less: of the weights that we keep, and of the other side's best epoch. Then our second run,
which finds the embeddings in the cache. Expect a factor near the number of epochs, as ours runs the backbone once where the
other runs it in each.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import apache_beam as beam
import keras
import numpy as np
import tensorflow as tf
import tensorflow_transform.beam as tft_beam
from apache_beam.options.pipeline_options import PipelineOptions
from tensorflow_transform.tf_metadata import dataset_metadata, schema_utils

from data.features import IMAGE_KEY, LABEL_KEY, TRAIN_SPLIT, VALID_SPLIT, feature_spec
from data.prepare import DataConfig, prepare, read_class_names
from models.classifier import ModelConfig, build_backbone, build_head, pool_statistics
from models.devices import DeviceConfig, Devices, configure_devices
from models.efficientnet_lite import LITE0, efficientnet_lite, load_imagenet_weights
from models.embeddings import EmbeddingsFolder, embed, embeddings_key, find_images
from models.folding import fold_batch_norm
from models.head import TrainingConfig, train_head
from preprocessing.transform import TransformGraph, preprocessing_fn

_OURS, _CACHED, _KERAS = "this project", "this project, cached", "Keras fit"
_MODEL = ModelConfig(backbone=LITE0.name)
_IMAGE_SIZE = _MODEL.input_spec.image_size
_BATCH_SIZE = 32
_DROPOUT = 0.2
_LEARNING_RATE = 1e-3
_PNG_MAGIC = b"\x89PNG"


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="elpv", help="folder per class, CSV or `elpv`")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, help="pairs; the medians are compared")
    parser.add_argument("--max-images", type=int, help="of each class and split, for a quick look")
    arguments = parser.parse_args()
    devices = configure_devices(DeviceConfig(accelerator="cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(DataConfig(input=arguments.data), str(folder / "prepared"))
        class_names = read_class_names(str(folder / "prepared"))
        counts = _write_sides(folder, class_names, max_images=arguments.max_images)
        print(f"{counts[TRAIN_SPLIT]} training and {counts[VALID_SPLIT]} validation images, {arguments.epochs} epochs")
        transform = TransformGraph(_trace_transform(folder / "transform", class_names))
        found: dict[str, list[tuple[float, float]]] = {}
        for number in range(arguments.rounds):
            cache = str(folder / f"cache{number}")
            ours = functools.partial(_run_ours, folder, cache, class_names, transform, devices, arguments.epochs)
            theirs = functools.partial(_run_keras, folder, class_names, arguments.epochs)
            pair = {_OURS: ours, _CACHED: ours, _KERAS: theirs}
            for label in pair if number % 2 else (_KERAS, _OURS, _CACHED):
                keras.utils.set_random_seed(number)
                seconds, accuracy = pair[label]()
                found.setdefault(label, []).append((seconds, accuracy))
                rate = counts[TRAIN_SPLIT] * arguments.epochs / seconds
                print(
                    f"{label:21} {seconds:7.1f} s {seconds / arguments.epochs:7.2f} s/epoch {rate:8.0f} images/s"
                    f"  validation accuracy {accuracy:.3f}",
                    flush=True,
                )
    medians = {label: statistics.median(seconds for seconds, _ in values) for label, values in found.items()}
    for label in (_OURS, _CACHED):
        print(f"{label}: {medians[_KERAS] / medians[label]:.1f} times as fast as {_KERAS}")
    print(f"load of the machine, over 1, 5 and 15 minutes: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def _run_ours(
    folder: Path, cache: str, class_names: tuple[str, ...], transform: TransformGraph, devices: Devices, epochs: int
) -> tuple[float, float]:
    """Runs stage one as the trainer does; returns its seconds, and the validation accuracy of the weights that it keeps."""
    backbone = build_backbone(_MODEL, image_size=_IMAGE_SIZE)
    started = time.monotonic()
    images = [find_images([str(folder / "records" / f"{split}.gz")], split=split) for split in (TRAIN_SPLIT, VALID_SPLIT)]
    network = pool_statistics(_MODEL, fold_batch_norm(backbone))
    with EmbeddingsFolder(cache, embeddings_key(network, images, settings={})) as embeddings_folder:
        projection, train, valid = embed(
            network, transform, *images, num_components=_MODEL.num_components, folder=embeddings_folder
        )
        head = build_head(_MODEL, num_components=len(projection.bias), num_classes=len(class_names))
        with tempfile.TemporaryDirectory() as checkpoints:
            settings = TrainingConfig(epochs=epochs, patience=epochs)
            train_head(settings, head, train=train, valid=valid, devices=devices, folder=checkpoints)
        seconds = time.monotonic() - started
        return seconds, np.mean(np.argmax(head.predict(valid.features, verbose=0), axis=1) == valid.labels)


def _run_keras(folder: Path, class_names: tuple[str, ...], epochs: int) -> tuple[float, float]:
    """Fits as Keras's guide does; returns its seconds and its best epoch's validation accuracy.

    Source: https://keras.io/guides/transfer_learning
    """
    network = efficientnet_lite(LITE0, image_size=_IMAGE_SIZE)
    load_imagenet_weights(LITE0, network)
    backbone = keras.Model(network.inputs[0], network.outputs[-1])
    backbone.trainable = False
    image = keras.Input((_IMAGE_SIZE, _IMAGE_SIZE, 3))
    x = keras.layers.GlobalAveragePooling2D()(backbone(image, training=False))
    x = keras.layers.Dropout(_DROPOUT)(x)
    model = keras.Model(image, keras.layers.Dense(len(class_names), activation="softmax")(x))
    model.compile(
        optimizer=keras.optimizers.Adam(_LEARNING_RATE),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    started = time.monotonic()
    train, valid = (
        keras.utils.image_dataset_from_directory(
            folder / "images" / split,
            class_names=list(class_names),
            image_size=(_IMAGE_SIZE, _IMAGE_SIZE),
            batch_size=_BATCH_SIZE,
            shuffle=split == TRAIN_SPLIT,
            verbose=False,
        ).prefetch(tf.data.AUTOTUNE)
        for split in (TRAIN_SPLIT, VALID_SPLIT)
    )
    history = model.fit(train, validation_data=valid, epochs=epochs, verbose=0).history
    return time.monotonic() - started, max(history["val_accuracy"])


def _write_sides(folder: Path, class_names: tuple[str, ...], *, max_images: int | None) -> dict[str, int]:
    """Writes the prepared records of both splits once as one file of records, once as a folder per class, from the same bytes.

    Returns:
      Number of images of each split.
    """
    (folder / "records").mkdir()
    features = {key: tf.io.FixedLenFeature([], tf.string) for key in (IMAGE_KEY, LABEL_KEY)}
    counts = {}
    for split in (TRAIN_SPLIT, VALID_SPLIT):
        files = sorted(str(path) for path in (folder / "prepared").glob(f"{split}-*.tfrecord.gz"))
        written = dict.fromkeys(class_names, 0)
        options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
        with tf.io.TFRecordWriter(str(folder / "records" / f"{split}.gz"), options) as writer:
            for record in tf.data.TFRecordDataset(files, "GZIP").as_numpy_iterator():
                parsed = tf.io.parse_single_example(record, features)
                encoded, label = parsed[IMAGE_KEY].numpy(), parsed[LABEL_KEY].numpy().decode()
                if max_images is not None and written[label] >= max_images:
                    continue
                suffix = ".png" if encoded.startswith(_PNG_MAGIC) else ".jpg"
                path = folder / "images" / split / label / f"{written[label]:06d}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded)
                writer.write(record)
                written[label] += 1
        counts[split] = sum(written.values())
    return counts


def _trace_transform(folder: Path, class_names: tuple[str, ...]) -> str:
    """Writes the graph that Transform makes of our `preprocessing_fn`."""
    metadata = dataset_metadata.DatasetMetadata(schema_utils.schema_from_feature_spec(feature_spec()))
    settings = {"input": _MODEL.input_spec.model_dump(mode="json"), "class_names": list(class_names)}
    black = tf.io.encode_png(tf.zeros((4, 4, 3), tf.uint8)).numpy()
    record = {"image": black, "label": class_names[0].encode(), "filename": b"black.png", "height": 4, "width": 4}
    record |= {"aspect": 1.0, "brightness": 0.0, "channels": 3}
    with (
        beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline,
        tft_beam.Context(temp_dir=str(folder / "temporary"), force_tf_compat_v1=False),
    ):
        data = pipeline | "Make a record" >> beam.Create([record])
        transform_fn = (data, metadata) | "Trace" >> tft_beam.AnalyzeDataset(
            functools.partial(preprocessing_fn, custom_config=settings)
        )
        _ = transform_fn | "Write the graph" >> tft_beam.WriteTransformFn(str(folder / "graph"))
    return str(folder / "graph")


if __name__ == "__main__":
    main()
