"""Measures the Evaluator against a bare loop over the same SavedModel on the same images, in pairs.

    .venv/bin/python tests/benchmarks/evaluator.py --workspace runs/elpv

Takes a finished workspace: its pushed model, classes and columns, and 1,000 images of its train split. The Evaluator is TFX's
own executor with the pipeline's `EvalConfig`, from the records to the blessing; the loop loads the model, reads the same
records and asks in batches of 64. With `--baseline` both do it for two models. About two minutes for three pairs on two cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as local_runner.py does
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tensorflow as tf
from absl import logging
from tfx.components.evaluator.executor import Executor
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import artifact_utils, standard_artifacts
from tfx.utils import json_utils, proto_utils

from data.features import RECORD_KEYS, TEST_SPLIT
from data.prepare import read_class_names
from pipeline.evaluation import EvaluationConfig, eval_config, read_evaluation

BATCH_SIZE = 64


def main() -> None:
    """Prints a line for each pair, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", default="runs/elpv", type=Path, help="of a finished run")
    parser.add_argument("--images", default=1_000, type=int)
    parser.add_argument("--pairs", default=3, type=int)
    parser.add_argument("--baseline", action="store_true", help="evaluate two models")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    model = max((arguments.workspace / "serving_model").iterdir(), key=lambda path: int(path.name))
    class_names = read_class_names(str(arguments.workspace / "tfrecords"))
    with tempfile.TemporaryDirectory() as folder:
        records = _take(arguments.workspace, arguments.images, Path(folder))
        columns = [name for name in tf.train.Example.FromString(records[0]).features.feature if name not in RECORD_KEYS]
        num_models = 2 if arguments.baseline else 1
        ratios = []
        for pair in range(arguments.pairs):
            loop = sum(_loop(model, Path(folder)) for _ in range(num_models))
            evaluator = _evaluate(model, arguments, Path(folder), class_names, columns)
            ratios.append(evaluator / loop)
            per_1000 = 1_000 / len(records)
            print(
                f"pair {pair + 1}: loop {loop * per_1000:.1f} s, Evaluator {evaluator * per_1000:.1f} s per 1,000 images "
                f"({len(records)} images, {num_models} model{'s' if num_models > 1 else ''}): {ratios[-1]:.2f} times",
                flush=True,
            )
    print(f"median: {statistics.median(ratios):.2f} times")


def _take(workspace: Path, num_images: int, folder: Path) -> list[bytes]:
    """Copies the first records of the train split as a test split."""
    shards = sorted(str(path) for path in (workspace / "tfrecords").glob("train-*.tfrecord.gz"))
    records = list(tf.data.TFRecordDataset(shards, "GZIP").take(num_images).as_numpy_iterator())
    target = folder / f"Split-{TEST_SPLIT}"
    target.mkdir()
    with tf.io.TFRecordWriter(str(target / "data.gz"), "GZIP") as writer:
        for record in records:
            writer.write(record)
    return records


def _loop(model: Path, folder: Path) -> float:
    started = time.perf_counter()
    examples = tf.saved_model.load(str(model)).signatures["examples"]
    for batch in tf.data.TFRecordDataset(str(folder / f"Split-{TEST_SPLIT}" / "data.gz"), "GZIP").batch(BATCH_SIZE):
        examples(examples=batch)["probabilities"].numpy()
    return time.perf_counter() - started


def _evaluate(
    model: Path, arguments: argparse.Namespace, folder: Path, class_names: tuple[str, ...], columns: list[str]
) -> float:
    output = Path(tempfile.mkdtemp(dir=folder))
    examples = standard_artifacts.Examples()
    examples.uri = str(folder)
    examples.split_names = artifact_utils.encode_split_names([TEST_SPLIT])
    schema = standard_artifacts.Schema()
    schema.uri = str(arguments.workspace / "tfrecords" / "schema")
    inputs = {"examples": [examples], "schema": [schema], "model": [_artifact(model, output, "model")]}
    if arguments.baseline:
        inputs["baseline_model"] = [_artifact(model, output, "baseline_model")]
    outputs = {"evaluation": [standard_artifacts.ModelEvaluation()], "blessing": [standard_artifacts.ModelBlessing()]}
    for name, (artifact,) in outputs.items():
        artifact.uri = str(output / name)
    config = eval_config(EvaluationConfig(), class_names, columns, image_size=224, code="")
    properties = {
        "eval_config": proto_utils.proto_to_json(config),
        "example_splits": json_utils.dumps([TEST_SPLIT]),
        "module_path": "pipeline.extractors",
    }
    context = BaseBeamExecutor.Context(beam_pipeline_args=["--runner=FnApiRunner"], tmp_dir=str(output), unique_id="1")
    started = time.perf_counter()
    Executor(context).Do(inputs, outputs, properties)
    seconds = time.perf_counter() - started
    found = read_evaluation(outputs["evaluation"][0].uri, class_names)
    if found.overall["example_count"] != arguments.images:
        raise RuntimeError(
            f"Expected {arguments.images} images to be evaluated. Received: {found.overall['example_count']:.0f}."
        )
    return seconds


def _artifact(model: Path, output: Path, name: str) -> standard_artifacts.Model:
    """Puts a link to the model, under a path of its own, as each execution finds a model that is not loaded yet."""
    folder = output / name
    folder.mkdir()
    (folder / "Format-Serving").symlink_to(model.resolve())
    artifact = standard_artifacts.Model()
    artifact.uri = str(folder)
    return artifact


if __name__ == "__main__":
    main()
