"""Measures the frozen backbone, as the trainer runs it, against ONNX Runtime, paired in one run.

    .venv/bin/uv venv .cache/onnx --python .venv/bin/python     # once: an environment of its own, so that this one stays
    .venv/bin/uv pip install --python .cache/onnx/bin/python onnx==1.23.2 onnxruntime==1.32.0
    python tests/benchmarks/backbone_throughput.py              # about two minutes on two idle cores

Both compute the pooled last feature map of EfficientNet-Lite0 with the same weights, folded, on the same images, with as many
threads as there are cores; that they find the same features is checked first. ONNX Runtime runs in a process of its own, which
measures itself when it is told to, so that the two take turns. Its threads spin while they wait, as it comes, and sleep in a
second session; each side's best batch counts, and the better of these two. Prints images a second, in which other work on the
machine shows, and the processor's time for an image, in which it shows little. Beside them, for information: the statistics of
the last feature map, and those of eight with covariances, which are the trainer's default.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT))

_PYTHON = _ROOT / ".cache" / "onnx" / "bin" / "python"
_OURS, _ONNX, _ONNX_ASLEEP = "TensorFlow", "ONNX Runtime", "ONNX Runtime, threads asleep"
_LAST_MAP, _DEFAULT = "statistics of the last map", "statistics as by default"
_MAX_DIFFERENCE = 1e-4
_OPSET, _IR_VERSION = 13, 9  # old enough for any ONNX Runtime of these years


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--images", type=int, default=128, help="in a measurement")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _serve(Path(arguments.worker))
        return
    if not _PYTHON.exists():
        sys.exit(f"error: Expected ONNX Runtime in {_PYTHON.parents[1]}. Received: none. Install it:\n{__doc__}")
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder), arguments.rounds, arguments.batches, arguments.images)


def _compare(folder: Path, rounds: int, batches: list[int], num_images: int) -> None:
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    from models.classifier import ModelConfig, build_backbone, build_statistics
    from models.embeddings import frozen_function
    from models.folding import fold_batch_norm

    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count())
    config = ModelConfig()
    size = config.input_spec.image_size
    backbone = fold_batch_norm(build_backbone(config, image_size=size))
    pooled = keras.layers.GlobalAveragePooling2D(name="features")(backbone.outputs[-1])
    network = keras.Model(backbone.inputs[0], pooled)
    last_map = ModelConfig(num_feature_maps=1, covariance=False)
    compute = {
        _OURS: frozen_function(network),
        _LAST_MAP: frozen_function(build_statistics(last_map, image_size=size)),
        _DEFAULT: frozen_function(build_statistics(config, image_size=size)),
    }
    images = _images(max(batches), config)
    np.save(folder / "images.npy", images)
    _write_graph(network, folder)
    with subprocess.Popen(
        [_PYTHON, __file__, "--worker", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        if worker.stdout.readline().strip() != "ready":
            sys.exit("error: ONNX Runtime did not start; its message is above.")
        features = compute[_OURS](tf.constant(images)).numpy()
        difference = np.abs(features - np.load(folder / "features.npy")).max()
        if difference > _MAX_DIFFERENCE:
            sys.exit(f"error: Expected the same features up to {_MAX_DIFFERENCE}. Received: a difference of {difference}.")
        print(f"largest difference of a feature: {difference:.1e}, of values up to {features.max():.1f}")

        def ask(batch_size: int, runs: int, *, is_asleep: bool) -> list[float]:
            worker.stdin.write(json.dumps([batch_size, runs, is_asleep]) + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        def run(name: str, batch_size: int, runs: int) -> list[float]:
            if name in (_ONNX, _ONNX_ASLEEP):
                return ask(batch_size, runs, is_asleep=name == _ONNX_ASLEEP)
            batch = tf.constant(images[:batch_size])
            return _measure(lambda: compute[name](batch).numpy(), runs)

        found: dict[tuple[str, int], list[list[float]]] = {}
        names = [_ONNX, _OURS, _ONNX_ASLEEP, _LAST_MAP, _DEFAULT]
        for number in range(rounds):
            for batch_size in batches:
                for name in names if number % 2 else names[::-1]:
                    runs = max(1, num_images // batch_size)
                    seconds = run(name, batch_size, runs)
                    found.setdefault((name, batch_size), []).append([one / (runs * batch_size) for one in seconds])
        worker.stdin.close()
    _report(found, names)


def _report(found: dict[tuple[str, int], list[list[float]]], names: list[str]) -> None:
    print(f"{'':30} batch  images/s: median, best  processor ms an image: median, least")
    for name, batch_size in sorted(found, key=lambda key: (names.index(key[0]), key[1])):
        wall, processor = zip(*found[name, batch_size], strict=True)
        print(
            f"{name:30} {batch_size:5}  {1 / statistics.median(wall):16.1f} {1 / min(wall):7.1f}"
            f"  {statistics.median(processor) * 1e3:29.2f} {min(processor) * 1e3:6.2f}"
        )

    def least(sides: tuple[str, ...], column: int, summary: Callable[[list[float]], float]) -> float:
        return min(summary([one[column] for one in values]) for (name, _), values in found.items() if name in sides)

    for label, column in (("speed", 0), ("processor time, inverse", 1)):
        ratios = [
            least((_ONNX, _ONNX_ASLEEP), column, summary) / least((_OURS,), column, summary)
            for summary in (statistics.median, min)
        ]
        print(f"{_OURS} to {_ONNX}, each at its best batch, {label}: medians {ratios[0]:.2f}, best {ratios[1]:.2f}")
    for batch_size in sorted({batch_size for _, batch_size in found}):
        ours, *theirs = (statistics.median(one[0] for one in found[name, batch_size]) for name in (_OURS, _ONNX, _ONNX_ASLEEP))
        print(f"  both with a batch of {batch_size}: {min(theirs) / ours:.2f}")
    print(f"load of the machine, over 1, 5 and 15 minutes: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def _measure(compute: Callable[[], Any], runs: int) -> list[float]:
    """Returns the seconds on the clock and of the processor."""
    compute()
    started, processor_started = time.perf_counter(), time.process_time()
    for _ in range(runs):
        compute()
    return [time.perf_counter() - started, time.process_time() - processor_started]


def _images(number: int, config: Any) -> np.ndarray:
    import tensorflow as tf

    from data.sources import ELPV, open_source
    from preprocessing.images import decode_images

    encoded = [Path(reference.path).read_bytes() for reference in open_source(ELPV).references[:number]]
    spec = config.input_spec
    return decode_images(tf.constant(encoded), image_size=spec.image_size, interpolation=spec.interpolation).numpy()


def _write_graph(network: Any, folder: Path) -> None:
    """Writes a folded network as ONNX nodes, in JSON, as ONNX itself is not in this environment."""
    import keras

    nodes: list[dict[str, Any]] = []
    weights: dict[str, np.ndarray] = {}

    def add(op: str, inputs: list[str], name: str, constants: dict[str, Any] | None = None, **attributes: Any) -> None:
        constants = {f"{name}.{key}": np.float32(value) for key, value in (constants or {}).items()}
        weights.update(constants)
        nodes.append({"op": op, "inputs": [*inputs, *constants], "output": name, "attributes": attributes})

    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        inputs = [tensor._keras_history.operation.name for tensor in keras.tree.flatten(layer.input)]
        if isinstance(layer, keras.layers.Rescaling):
            add("Mul", inputs, f"{layer.name}.scaled", {"scale": layer.scale})
            add("Add", [f"{layer.name}.scaled"], layer.name, {"offset": layer.offset})
        elif isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            kernel, bias = layer.get_weights()
            is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            size, stride, side = layer.kernel_size[0], layer.strides[0], layer.input.shape[1]
            padding = max((-(-side // stride) - 1) * stride + size - side, 0)
            before, after = padding // 2, padding - padding // 2
            # [height, width, channel, 1] or [height, width, in, out] -> [out, in, height, width]
            kernel = np.ascontiguousarray(kernel.transpose((2, 3, 0, 1) if is_depthwise else (3, 2, 0, 1)))
            groups = len(bias) if is_depthwise else 1
            pads = [before, before, after, after]
            add("Conv", inputs, layer.name, {"kernel": kernel, "bias": bias}, group=groups, strides=[stride] * 2, pads=pads)
        elif isinstance(layer, keras.layers.ReLU):
            add("Clip", inputs, layer.name, {"min": 0.0, "max": layer.max_value})
        elif isinstance(layer, keras.layers.Add):
            add("Add", inputs, layer.name)
        elif isinstance(layer, keras.layers.GlobalAveragePooling2D):
            add("GlobalAveragePool", inputs, f"{layer.name}.map")
            add("Flatten", [f"{layer.name}.map"], layer.name)
        else:
            raise ValueError(f"Expected layers of a folded EfficientNet-Lite. Received: {layer}.")
    graph = {"input": network.inputs[0].name, "shape": network.input_shape, "nodes": nodes, "output": network.layers[-1].name}
    (folder / "graph.json").write_text(json.dumps(graph))
    np.savez(folder / "weights.npz", **weights)


def _serve(folder: Path) -> None:
    """Runs in the other environment: loads the network into ONNX Runtime and measures it as told on the standard input."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    graph = json.loads((folder / "graph.json").read_text())
    _, height, width, channels = graph["shape"]
    num_features = np.load(folder / "weights.npz")["head_conv.bias"].shape[0]
    float_type = onnx.TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(node["op"], node["inputs"], [node["output"]], **node["attributes"]) for node in graph["nodes"]],
            "backbone",
            [helper.make_tensor_value_info(graph["input"], float_type, ["batch", channels, height, width])],
            [helper.make_tensor_value_info(graph["output"], float_type, ["batch", num_features])],
            [numpy_helper.from_array(value, name) for name, value in np.load(folder / "weights.npz").items()],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    sessions = []
    for is_spinning in (True, False):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(is_spinning)))
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))
    # Channels first, as it computes; the change of layout does not count.
    images = np.ascontiguousarray(np.load(folder / "images.npy").transpose(0, 3, 1, 2))
    np.save(folder / "features.npy", sessions[0].run(None, {graph["input"]: images})[0])
    print("ready", flush=True)
    for line in sys.stdin:
        batch_size, runs, is_asleep = json.loads(line)
        session, feed = sessions[is_asleep], {graph["input"]: images[:batch_size]}
        print(json.dumps(_measure(lambda session=session, feed=feed: session.run(None, feed), runs)), flush=True)


if __name__ == "__main__":
    main()
