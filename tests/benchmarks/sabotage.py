"""Puts sabotaged copies of a trained model before the real gate: who refuses each, and why.

    python tests/benchmarks/sabotage.py                          # the default run, runs/elpv: 10 minutes on two cores
    python tests/benchmarks/sabotage.py --workspace runs/photos

`tests/test_gate.py` does the same with a tiny network and asserts each reason; this shows it on a finished run's own model and
data, with the default limits. The latest model of the workspace is rebuilt from its weights, changed in one way and exported
anew, with its own reference predictions, as a trainer would leave them. Then TFX's Evaluator, our ServingCheck and TFX's Pusher
judge it, against the baseline that the row names. Nothing is written into the workspace.

Prints for each model whether it was refused or pushed, by whom, its accuracy, the seconds of the Evaluator and of the serving
check, and the first reason.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import keras
import numpy as np
import tensorflow as tf
from test_gate import (
    ServesOtherwise,
    WithImageFunction,
    make_artifact,
    run_evaluator,
    run_pusher,
    run_serving_check,
    slow_down,
)
from tfx.types import artifact_utils, standard_artifacts

from data.features import IMAGE_KEY, LABELS_FILE, SCHEMA_FOLDER, SPLITS, TEST_SPLIT, VALID_SPLIT
from data.prepare import DataConfig
from models.classifier import ModelConfig, logits_of
from models.embeddings import find_images, read_images
from models.reference import write_reference_predictions
from models.signatures import ImageClassifier, export
from models.trained import EXTRA_FOLDER, NETWORK_FILE, NetworkSpec, read_exported_model
from pipeline.evaluation import EvaluationConfig, eval_config, read_evaluation
from pipeline.records import read_records
from pipeline.serving_check import ServingCheckConfig, read_serving_check
from preprocessing.transform import TransformGraph

_TRAINED = "as it was trained"
_EQUAL, _WORSE, _SLOW = "a little noise in the head", "much noise in the head", "slow"
_LATENCY_MARGIN = 3  # times the trained model's own latency: the budget of the slow one
_SLOW_STEPS = 100_000  # a third of a second
_BROKEN = 0.55  # of the images of the slice that is broken
_EPOCHS = 20  # of the head that learns shuffled labels


class Workspace:
    """What a finished local run left: its latest model, its data, and how images become the network's input."""

    def __init__(self, folder: Path):
        self.records = read_records(str(folder / "tfrecords"), DataConfig())
        self.model = _latest(folder / "pipeline/Trainer/model")
        self.run = _latest(folder / "pipeline/Trainer/model_run")
        self.transform = TransformGraph(str(_latest(folder / "pipeline/Transform/transform_graph")))
        self.examples = make_artifact(standard_artifacts.Examples, _latest(folder / "pipeline/ImportExampleGen/examples"))
        self.examples.split_names = artifact_utils.encode_split_names(list(SPLITS))
        self.schema = make_artifact(standard_artifacts.Schema, folder / "tfrecords" / SCHEMA_FOLDER)
        self.spec = self._read_spec()
        self.network = read_exported_model(str(self.model / "Format-Serving"), self.spec).build_for_inference()

    def files(self, split: str) -> list[str]:
        return sorted(tf.io.gfile.glob(f"{artifact_utils.get_split_uri([self.examples], split)}/*"))

    def _read_spec(self) -> NetworkSpec:
        settings = json.loads((self.model / "Format-Serving" / EXTRA_FOLDER / NETWORK_FILE).read_text())
        model = ModelConfig(**{name: value for name, value in settings.items() if name in ModelConfig.model_fields})
        input_spec = model.input_spec.model_copy(update={"image_size": settings["image_size"]})
        return NetworkSpec(class_names=settings["class_names"], input=input_spec, model=model)


def _latest(folder: Path) -> Path:
    """Returns the output of a component's latest execution; TFX names each by its number."""
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


class Saboteur:
    """Makes a copy of the trained model, changed in one way, in a folder as the Trainer's artifact is."""

    def __init__(self, workspace: Workspace, folder: Path):
        self._workspace = workspace
        self._folder = folder
        self._random = np.random.default_rng(0)
        self._valid = find_images(workspace.files(VALID_SPLIT), split=VALID_SPLIT)
        batches = list(read_images(workspace.transform, self._valid).as_numpy_iterator())
        self._images = np.concatenate([images for images, _ in batches])
        self._labels = np.concatenate([labels for _, labels in batches])

    def models(self) -> Iterator[tuple[str, Path, Path]]:
        """Makes one after the other; yields what it is, its folder, and that of the run that trained it."""
        network, transform, names = self._workspace.network, self._workspace.transform, self._workspace.records.class_names
        yield _TRAINED, self._workspace.model, self._workspace.run
        yield _EQUAL, *self._export("equal", self._with_head(self._noisy_head(0.02)))
        yield _WORSE, *self._export("worse", self._with_head(self._noisy_head(1.0)))
        yield "shuffled labels", *self._export("shuffled", self._with_head(self._shuffled_head()))
        yield f"never says {names[-1]}", *self._export("never", self._with_logits(_without_the_last))
        if self._workspace.records.columns:
            column, value, images = self._break_slice()
            broken = self._export("slice", network, transform=WithImageFunction(transform, images))
            yield f"broken on {column}={value}", *broken
        yield "overconfident", *self._export("overconfident", self._with_logits(lambda logits: 50 * logits))
        slow = WithImageFunction(transform, lambda encoded: slow_down(transform.images(encoded), num_steps=_SLOW_STEPS))
        yield _SLOW, *self._export("slow", network, transform=slow)
        served = WithImageFunction(transform, self._resize)
        yield "another resize in serving_default", *self._export("resize", network, served=served)
        more = self._with_logits(lambda logits: keras.ops.pad(logits, [(0, 0), (0, 1)], constant_values=-100.0))
        yield "a class too many", *self._export("classes", more, class_names=(*names, "another"))
        yield "NaN in the head", *self._export("nan", self._with_head([weight * np.nan for weight in self._head_weights()]))
        cut = Path(shutil.copytree(self._workspace.model, self._folder / "cut"))
        graph = cut / "Format-Serving" / "saved_model.pb"
        graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
        yield "saved_model.pb cut in half", cut, self._workspace.run

    def _export(
        self,
        name: str,
        network: keras.Model,
        *,
        transform: TransformGraph | WithImageFunction | None = None,
        served: WithImageFunction | None = None,
        class_names: Sequence[str] = (),
    ) -> tuple[Path, Path]:
        transform, class_names = transform or self._workspace.transform, class_names or self._workspace.records.class_names
        arguments = (network, transform, class_names)
        classifier = ServesOtherwise(*arguments, served) if served else ImageClassifier(*arguments)
        model = self._folder / name / "Format-Serving"
        export(classifier, str(model))
        (model / EXTRA_FOLDER).mkdir()
        (model / EXTRA_FOLDER / LABELS_FILE).write_text("".join(f"{line}\n" for line in class_names))
        run = self._folder / f"run of {name}"
        run.mkdir()
        write_reference_predictions(network, self._workspace.transform, self._valid, folder=str(run))
        return model.parent, run

    def _with_logits(self, change: Callable[[Any], Any]) -> keras.Model:
        logits = logits_of(self._workspace.network)
        return keras.Model(logits.inputs[0], keras.layers.Softmax()(change(logits.outputs[0])))

    def _head_weights(self) -> list[np.ndarray]:
        return self._workspace.network.get_layer("head").get_weights()

    def _with_head(self, weights: Sequence[np.ndarray]) -> keras.Model:
        projection = self._workspace.network.get_layer("projection").output
        head = self._workspace.spec.build_head(num_components=projection.shape[-1])
        head.set_weights(weights)
        return keras.Model(self._workspace.network.inputs[0], keras.layers.Softmax()(head(projection)))

    def _noisy_head(self, strength: float) -> list[np.ndarray]:
        """Adds noise to the weights, of so many times their own standard deviation."""
        return [
            weight + strength * weight.std() * self._random.standard_normal(weight.shape) for weight in self._head_weights()
        ]

    def _shuffled_head(self) -> list[np.ndarray]:
        """Trains a head on the validation images with each other's labels."""
        network = self._workspace.network
        embeddings = keras.Model(network.inputs[0], network.get_layer("projection").output).predict(self._images, verbose=0)
        head = self._workspace.spec.build_head(num_components=embeddings.shape[-1])
        head.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        head.fit(embeddings, self._random.permutation(self._labels), epochs=_EPOCHS, verbose=0)
        return head.get_weights()

    def _break_slice(self) -> tuple[str, str, Callable[[tf.Tensor], tf.Tensor]]:
        """Shows the network one and the same image, of the rarest class, in the place of most test images of a slice.

        Not of all, where the accuracy over all test images would fall below its limit too.

        Returns:
          The first column, its least frequent value that has enough images to be judged, and how images are made.
        """
        column = self._workspace.records.columns[0]
        features = [
            tf.train.Example.FromString(record).features.feature
            for record in tf.data.TFRecordDataset(self._workspace.files(TEST_SPLIT), "GZIP").as_numpy_iterator()
        ]
        values = [feature[column].bytes_list.value[0] for feature in features]
        judged = {value for value in values if values.count(value) >= EvaluationConfig().min_slice_examples}
        chosen = min(judged or values, key=values.count)
        encoded = [
            feature[IMAGE_KEY].bytes_list.value[0] for feature, value in zip(features, values, strict=True) if value == chosen
        ]
        known = tf.strings.to_hash_bucket_fast(encoded[: int(_BROKEN * len(encoded))], 2**62)
        rarest = np.bincount(self._labels).argmin()
        probabilities = self._workspace.network.predict(self._images, verbose=0)
        # The least sure one, as overconfidence has a limit of its own.
        is_rarest = probabilities.argmax(axis=1) == rarest
        stand_in = tf.constant(self._images[np.where(is_rarest, probabilities[:, rarest], np.inf).argmin()])
        images = self._workspace.transform.images

        def make_images(encoded: tf.Tensor) -> tf.Tensor:
            hashes = tf.strings.to_hash_bucket_fast(encoded, 2**62)
            is_known = tf.reduce_any(hashes[:, tf.newaxis] == known[tf.newaxis], axis=1)
            return tf.where(is_known[:, tf.newaxis, tf.newaxis, tf.newaxis], stand_in, images(encoded))

        return column, chosen.decode(), make_images

    def _resize(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes and resizes with TensorFlow's defaults: bilinear, and not antialiased."""
        size = [self._workspace.spec.input.image_size] * 2

        def resize(image: tf.Tensor) -> tf.Tensor:
            return tf.image.resize(tf.io.decode_image(image, channels=3, expand_animations=False), size)

        return tf.map_fn(resize, encoded, fn_output_signature=tf.float32)


def _without_the_last(logits: Any) -> Any:
    """Makes the last class always the least probable, though not by much."""
    others = logits[:, :-1]
    return keras.ops.concatenate([others, keras.ops.min(others, axis=-1, keepdims=True) - 1], axis=-1)


class Table:
    """Judges models by the default limits of the Evaluator and prints a row for each."""

    def __init__(self, workspace: Workspace, folder: Path):
        self._workspace = workspace
        self._folder = folder
        print(f"{'model':36} {'baseline':20} {'verdict':8} {'refused by':24} accuracy, seconds of each, first reason")

    def judge(
        self, name: str, model: Path, run: Path, *, baseline: tuple[str, Path] | None = None, **serving: float
    ) -> dict[str, Any]:
        """Judges a model.

        Args:
          name: of the model.
          model: its folder.
          run: folder of the run that trained it.
          baseline: name and folder of the latest blessed model, if there is one.
          **serving: settings of `ServingCheckConfig`.

        Returns:
          The serving check's verdict.
        """
        workspace, records, folder = self._workspace, self._workspace.records, Path(tempfile.mkdtemp(dir=self._folder))
        specification = eval_config(
            EvaluationConfig(), records.class_names, records.columns, image_size=workspace.spec.input.image_size, code=""
        )
        started = time.monotonic()
        blessing = run_evaluator(
            model,
            baseline[1] if baseline else None,
            specification,
            examples=workspace.examples,
            schema=workspace.schema,
            folder=folder,
        )
        evaluated = time.monotonic()
        infra_blessing = run_serving_check(model, run, ServingCheckConfig(**serving), blessing=blessing, folder=folder)
        checked = time.monotonic()
        says_pushed, versions = run_pusher(model, blessing=blessing, infra_blessing=infra_blessing, folder=folder)
        if says_pushed is not bool(versions):
            sys.exit(f"error: Pusher says pushed={says_pushed}, and the serving folder holds {versions}")
        evaluation = read_evaluation(str(folder / "evaluation"), records.class_names)
        verdict = read_serving_check(infra_blessing.uri)
        refused_by = {"Evaluator": evaluation.reasons, "ServingCheck": verdict["reasons"]}
        names = " + ".join(judge for judge, reasons in refused_by.items() if reasons)
        first = [*evaluation.reasons, *verdict["reasons"], ""][0]
        print(
            f"{name:36} {baseline[0] if baseline else '-':20} {'pushed' if versions else 'REFUSED':8} {names or '-':24} "
            f"{evaluation.overall['accuracy']:.3f} {evaluated - started:5.1f} {checked - evaluated:5.1f}  {first}",
            flush=True,
        )
        return verdict


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/elpv"), help="of a finished local run")
    workspace = Workspace(parser.parse_args().workspace)
    with tempfile.TemporaryDirectory() as name:
        saboteur, table = Saboteur(workspace, Path(name)), Table(workspace, Path(name))
        made = {}
        for name, model, run in saboteur.models():
            made[name] = model
            if name == _TRAINED:
                budget_ms = _LATENCY_MARGIN * table.judge(name, model, run)["latency_ms"]["1"]["p99"]
            elif name == _SLOW:
                table.judge(name, model, run, max_latency_ms=budget_ms)
            else:
                baseline = (_TRAINED, workspace.model) if name in (_EQUAL, _WORSE) else None
                table.judge(name, model, run, baseline=baseline)
        table.judge(_TRAINED, workspace.model, workspace.run, baseline=("the noisy one", made[_WORSE]))


if __name__ == "__main__":
    main()
