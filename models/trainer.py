"""`run_fn`, the Trainer component's entry: embeds every image once, trains the head, fine-tunes the backbone, exports.

Stage one (`models.embeddings`, `models.head`): the backbone is frozen, so an image's embedding never changes: 2,600 images take
about 30 seconds on two CPU cores, after which an epoch of the head takes a fraction of a second, where a plain training loop
runs the backbone in every epoch. Stage two (`models.fine_tuning`), where it is on, trains the top of the backbone too.
"""

import hashlib
import itertools
import json
import logging
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data.features import LABELS_FILE, TRAIN_SPLIT, VALID_SPLIT
from data.fingerprint import code_fingerprint
from models.backbones import weights_fingerprint
from models.classifier import pool_statistics
from models.curves import save_curves
from models.devices import DeviceConfig, Devices, configure_devices
from models.embeddings import EmbeddingsFolder, Images, embed, embeddings_key, find_images, read_images
from models.fine_tuning import FineTuningConfig, fine_tune
from models.folding import fold_batch_norm
from models.head import TrainingConfig, train_head
from models.loop import CHECKPOINTS, adopt_checkpoints, keep_checkpoints, remove_checkpoints
from models.network_table import describe_network
from models.reference import write_reference_predictions
from models.signatures import ImageClassifier, export
from models.tflite import NUM_CALIBRATION_IMAGES, ExportConfig, compare_tflite, export_tflite
from models.trained import (
    EXTRA_FOLDER,
    NetworkSpec,
    TrainedClassifier,
    read_classifier,
    read_exported_model,
    write_network_file,
)
from preprocessing.augment import AugmentationConfig
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

CONFIG_KEY = "trainer"
HISTORY_FILE = "history.json"
CURVES_FILE = "curves.png"
TFLITE_FOLDER = "tflite"  # in `assets.extra`
TFLITE_FILE = "tflite.json"  # what the TFLite models lose
_HEAD_FILE = "head.npz"  # the classifier after stage one


class TrainerConfig(NetworkSpec):
    """All that the trainer is told, as it crosses into the component as JSON.

    Attributes:
      training: of the head.
      fine_tuning: of the backbone.
      augmentation: of the images in fine-tuning.
      devices: what to compute on.
      export: what goes beside the SavedModel.
      cache_dir: local or gs:// folder in which embeddings outlive the run; empty for none.
      code: fingerprint of the code behind `run_fn`, which TFX's cache would not see otherwise.
    """

    training: TrainingConfig
    fine_tuning: FineTuningConfig
    augmentation: AugmentationConfig
    devices: DeviceConfig
    export: ExportConfig
    cache_dir: str
    code: str

    @property
    def spec(self) -> NetworkSpec:
        """The network alone."""
        return NetworkSpec(class_names=self.class_names, input=self.input, model=self.model)


def run_fn(fn_args: Any) -> None:
    """Trains and exports; TFX calls it.

    Args:
      fn_args: `tfx.components.FnArgs`; its `custom_config` holds a `TrainerConfig` as JSON under `trainer`, its
        `hyperparameters`, where there are any, what the Tuner found or a run was given, and its `base_model` the model to
        start from.
    """
    config = TrainerConfig.model_validate(fn_args.custom_config[CONFIG_KEY])
    if fn_args.hyperparameters:
        config = with_hyperparameters(config, fn_args.hyperparameters["values"])
    devices = configure_devices(config.devices)
    transform = TransformGraph(fn_args.transform_graph_path)
    train = find_images(fn_args.train_files, split=TRAIN_SPLIT)
    valid = find_images(fn_args.eval_files, split=VALID_SPLIT)
    checkpoints = os.path.join(fn_args.model_run_dir, CHECKPOINTS)
    try:
        classifier = train_classifier(
            config, devices, transform, train, valid, folder=fn_args.model_run_dir, base_model=fn_args.base_model
        )
        devices.wait_for_all()  # until they have all read what the chief removes at its end
        if devices.is_chief:
            with tf.io.gfile.GFile(os.path.join(fn_args.model_run_dir, HISTORY_FILE), "w") as file:
                json.dump(classifier.history, file)
            save_curves(classifier.history, os.path.join(fn_args.model_run_dir, CURVES_FILE))
            _export(config, classifier, transform, train, valid, fn_args)
    except Exception:
        if devices.is_chief:
            keep_checkpoints(checkpoints)
        raise
    if devices.is_chief:
        remove_checkpoints(checkpoints)
    devices.wait_for_all()  # Vertex ends the job where the first worker ends


def with_hyperparameters(config: TrainerConfig, values: dict[str, Any]) -> TrainerConfig:
    """Puts values, named `section.key`, in the place of the settings."""
    settings = config.model_dump()
    for name, value in values.items():
        section, _, key = name.partition(".")
        settings[section][key] = value
    logger.info("hyperparameters: %s", ", ".join(f"{name}={value}" for name, value in values.items()))
    return TrainerConfig.model_validate(settings)


def train_classifier(
    config: TrainerConfig,
    devices: Devices,
    transform: TransformGraph,
    train: Images,
    valid: Images,
    *,
    folder: str,
    base_model: str | None = None,
) -> TrainedClassifier:
    """Trains both stages, or goes on where a killed run of the same work was.

    Args:
      config: all settings.
      devices: what to compute on.
      transform: the Transform graph, so that training sees what serving will.
      train: the training images.
      valid: the validation images.
      folder: of the checkpoints and the TensorBoard logs; local or gs://, and the same for all workers.
      base_model: folder of an exported model to start from, or None.

    Raises:
      InputError: if the model to start from is another network, or the backbone cannot be fine-tuned.
      ValueError: if a class has no image, a label is not in the class list, or the loss becomes NaN.
    """
    keras.utils.set_random_seed(config.training.seed)
    head_file = os.path.join(folder, CHECKPOINTS, _HEAD_FILE)
    if devices.is_chief:
        with tf.device(devices.local_device):
            _train_first_stage(
                config, devices, transform, train, valid, folder=folder, head_file=head_file, base_model=base_model
            )
    devices.wait_for_all()
    classifier = read_classifier(head_file, config.spec)
    if not config.fine_tuning.epochs:
        return classifier
    return fine_tune(
        config.fine_tuning,
        classifier,
        training=config.training,
        augmentation=config.augmentation,
        transform=transform,
        train=train,
        valid=valid,
        devices=devices,
        folder=folder,
    )


def _train_first_stage(
    config: TrainerConfig,
    devices: Devices,
    transform: TransformGraph,
    train: Images,
    valid: Images,
    *,
    folder: str,
    head_file: str,
    base_model: str | None,
) -> None:
    """Embeds the images and trains the head, and leaves the classifier in a file for all workers, and for a rerun."""
    base = read_exported_model(base_model, config.spec) if base_model else None
    backbone = base.build_backbone() if base else config.spec.build_backbone()
    statistics = pool_statistics(config.model, fold_batch_norm(backbone))
    settings = {
        "input": config.input.model_dump(mode="json"),
        "class_names": config.class_names,  # whose places are the labels
        "model": config.model.model_dump(mode="json", exclude={"hidden_units", "dropout"}),
        "weights": weights_fingerprint(config.model.backbone, config.model.weights_file),
        "projection": hashlib.sha256(base.projection.kernel.tobytes()).hexdigest() if base else "",
        "precision": devices.precision,
        "code": code_fingerprint("models.embeddings", distributions=("tensorflow", "keras")),
    }
    key = embeddings_key(statistics.get_weights(), [train, valid], settings=settings)
    fingerprint = _fingerprint(config, key, base, num_replicas=devices.num_replicas)
    adopt_checkpoints(os.path.join(folder, CHECKPOINTS), fingerprint=fingerprint)
    if tf.io.gfile.exists(head_file):
        logger.info("the head is trained already")
        return
    with EmbeddingsFolder(config.cache_dir, key) as embeddings_folder:
        projection, train_embeddings, valid_embeddings = embed(
            statistics,
            transform,
            train,
            valid,
            num_components=config.model.num_components,
            folder=embeddings_folder,
            projection=base.projection if base else None,
        )
        head = base.build_head() if base else config.spec.build_head(num_components=len(projection.bias))
        history = train_head(
            config.training, head, train=train_embeddings, valid=valid_embeddings, devices=devices, folder=folder
        )
        label_counts = np.bincount(train_embeddings.labels, minlength=len(config.class_names)).tolist()
    TrainedClassifier(
        config.spec, backbone.get_weights(), projection, head.get_weights(), label_counts=label_counts, history=history
    ).write(head_file)


def _fingerprint(config: TrainerConfig, embeddings: str, base: TrainedClassifier | None, *, num_replicas: int) -> str:
    """Names the work of a run, for whoever would go on with it; with other replicas a step is another one."""
    settings = config.model_dump(mode="json", exclude={"cache_dir", "export", "devices"})
    digest = hashlib.sha256(json.dumps([settings, embeddings, num_replicas], sort_keys=True).encode())
    for weight in base.head if base else ():
        digest.update(weight.tobytes())
    return digest.hexdigest()


def _export(
    config: TrainerConfig,
    classifier: TrainedClassifier,
    transform: TransformGraph,
    train: Images,
    valid: Images,
    fn_args: Any,
) -> None:
    """Exports the SavedModel with what goes beside it, and leaves the network's own answers in the folder of the run."""
    logger.info("exporting the model")
    network = classifier.build_for_inference()
    logger.getChild("network").info("the exported network:\n%s", describe_network(network))
    export(ImageClassifier(network, transform, config.class_names), fn_args.serving_model_dir)
    # The baseline's resolver reads the class list, and a run that starts from this model the other.
    extra = os.path.join(fn_args.serving_model_dir, EXTRA_FOLDER)
    tf.io.gfile.makedirs(extra)
    with tf.io.gfile.GFile(os.path.join(extra, LABELS_FILE), "w") as file:
        file.write("".join(f"{name}\n" for name in config.class_names))
    write_network_file(config.spec, fn_args.serving_model_dir)
    # The serving check compares the exported model with the network that is still here.
    write_reference_predictions(network, transform, valid, folder=fn_args.model_run_dir)
    if kinds := config.export.tflite:
        folder = os.path.join(extra, TFLITE_FOLDER)
        # The first images are a fair sample, as records are in the order of a hash.
        images = (image for images, _ in read_images(transform, train) for image in images.numpy())
        calibration_images = itertools.islice(images, NUM_CALIBRATION_IMAGES)
        paths = export_tflite(
            network, folder, kinds=kinds, calibration_images=calibration_images, class_names=config.class_names
        )
        comparison = compare_tflite(network, paths, read_images(transform, valid))
        for kind, found in comparison.items():
            logger.info(
                "TFLite %s: accuracy %.3f on the validation images, the SavedModel %.3f",
                kind,
                found["accuracy"],
                found["network_accuracy"],
            )
        with tf.io.gfile.GFile(os.path.join(folder, TFLITE_FILE), "w") as file:
            json.dump(comparison, file, indent=2)
