"""Measures `data.prepare`: against the usual way of writing TFRecords, and how time and memory grow with the data.

    python tests/benchmarks/prepare_data.py --data flowers/all_data.csv --rounds 3      # about four minutes on two cores
    python tests/benchmarks/prepare_data.py --scale                                     # about three minutes

The usual way is the one of the book *Practical Machine Learning for Computer Vision*, written anew for this benchmark: a Beam
job decodes each image and writes its pixels as floats in [0, 1], with GZIP, in a split drawn by chance. It checks nothing. It
writes with TensorFlow at the lowest level of compression, as we do: Beam's own writer takes many times as long here. Each
measurement is a process of its own on the in-process Beam runner; its seconds are those of the job, without imports.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, _ROOT)

_OURS, _USUAL = "data.prepare", "decoded floats"
_SCALE = (5_000, 20_000)


def main() -> None:
    """Runs the comparison, or the measurement of growth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="elpv", help="folder per class, CSV or `elpv`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", action="store_true", help="measure how time and memory grow")
    parser.add_argument("--job", choices=(_OURS, _USUAL), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(_run_job(arguments.job, arguments.data, arguments.output)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.scale:
            _measure_growth(Path(folder))
        else:
            _compare(arguments.data, arguments.rounds, Path(folder))


def _compare(data: str, rounds: int, folder: Path) -> None:
    results = {_OURS: [], _USUAL: []}
    for number in range(rounds):
        for job in (_OURS, _USUAL) if number % 2 else (_USUAL, _OURS):
            results[job].append(_measure(job, data, folder / "records"))
    for job, found in results.items():
        seconds = statistics.median(one["seconds"] for one in found)
        rate = found[0]["images"] / seconds
        print(f"{job:15} {seconds:6.1f} s  {rate:6.0f} images/s  {found[0]['bytes'] / 1e6:8.1f} MB")
    ratios = [usual["seconds"] / ours["seconds"] for ours, usual in zip(results[_OURS], results[_USUAL], strict=True)]
    print(
        f"{statistics.median(ratios):.1f} times as fast (each round: {', '.join(f'{ratio:.1f}' for ratio in ratios)}), ", end=""
    )
    print(f"{results[_USUAL][0]['bytes'] / results[_OURS][0]['bytes']:.1f} times fewer bytes")


def _measure_growth(folder: Path) -> None:
    for number in _SCALE:
        images = _draw(folder / f"images{number}", number)
        found = _measure(_OURS, str(images), folder / "records")
        print(f"{number:6,} images: {found['seconds']:6.1f} s, at most {found['peak_bytes'] / 1e6:,.0f} MB", flush=True)


def _draw(folder: Path, number: int) -> Path:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(number):
        path = folder / ("even", "odd")[index % 2] / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 96)).save(path, quality=90)
    return folder


def _measure(job: str, data: str, output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", job, "--data", os.path.abspath(data) if os.path.exists(data) else data]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    found["bytes"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    shutil.rmtree(output)
    return found


def _run_job(job: str, data: str, output: str) -> dict[str, float]:
    if job == _OURS:
        from data.prepare import DataConfig, prepare

        started = time.monotonic()
        num_images = prepare(DataConfig(input=data), output)["images"]
    else:
        import apache_beam  # noqa: F401  imports do not count
        import tensorflow  # noqa: F401

        from data.sources import open_source

        started = time.monotonic()
        references = open_source(data).references
        _write_floats(references, output)
        num_images = len(references)
    seconds = time.monotonic() - started
    return {"images": num_images, "seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _write_floats(references: list, output: str) -> None:
    """Decodes every image and writes its pixels as floats."""
    import apache_beam as beam
    import tensorflow as tf
    from apache_beam.options.pipeline_options import PipelineOptions

    labels = sorted({reference.label for reference in references})

    def to_example(reference) -> bytes:
        image = tf.io.decode_image(tf.io.read_file(reference.path), channels=3, expand_animations=False)
        image = tf.image.convert_image_dtype(image, tf.float32).numpy()
        features = {
            "image": tf.train.Feature(float_list=tf.train.FloatList(value=image.ravel())),
            "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
            "label": tf.train.Feature(bytes_list=tf.train.BytesList(value=[reference.label.encode()])),
            "label_int": tf.train.Feature(int64_list=tf.train.Int64List(value=[labels.index(reference.label)])),
        }
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    draw = random.Random(0)
    by_split = {"train": [], "valid": [], "test": []}
    for reference in references:
        by_split[draw.choices(list(by_split), weights=(8, 1, 1))[0]].append(reference)
    os.makedirs(output)

    class Write(beam.DoFn):
        def __init__(self, split: str):
            self._split = split

        def start_bundle(self) -> None:
            path = os.path.join(output, f"{self._split}-{uuid.uuid4().hex}.gz")
            options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
            self._writer = tf.io.TFRecordWriter(path, options)

        def process(self, serialized: bytes) -> None:
            self._writer.write(serialized)

        def finish_bundle(self) -> None:
            self._writer.close()

    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        for split, members in by_split.items():
            _ = (
                pipeline
                | f"List {split}" >> beam.Create(members)
                | f"Decode {split}" >> beam.Map(to_example)
                | f"Write {split}" >> beam.ParDo(Write(split))
            )


if __name__ == "__main__":
    main()
