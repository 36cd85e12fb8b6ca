"""What the tests share: small images whose classes a network can tell apart, a Transform graph, ports and log levels."""

import csv
import functools
import io
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before anything loads TensorFlow, as `local_runner.py` does.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from absl import logging as absl_logging
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
CLASS_NAMES = ("circle", "square")
TRANSFORM_IMAGE_SIZE = 32  # pixels; of the graph that `transform_graph` makes

_SHAPES = ("circle", "square", "triangle", "cross")
_MIN_CONTRAST = 90  # between the shape and its ground, of 255
# Linux takes the ports of outgoing connections from 32,768 on, so that nothing takes one of these before it is used. Each
# worker of pytest has its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(10_000 + 2_000 * (_WORKER % 10) + os.getpid() % 1_000)
_LOG_LEVELS = {
    logger: logger.level for logger in (logging.getLogger(), absl_logging.get_absl_logger(), logging.getLogger("tfx_vision"))
}


@pytest.fixture(autouse=True)
def _log_levels() -> None:
    """Gives each test the log levels of the beginning, whatever a test, a fixture or a library before it has set."""
    for logger, level in _LOG_LEVELS.items():
        logger.setLevel(level)


def messages_of(caplog: pytest.LogCaptureFixture, name: str = "tfx_vision") -> list[str]:
    """Returns what one logger has said; a thread of a library may have logged, too."""
    return [record.getMessage() for record in caplog.records if record.name == name]


def find_free_ports(num_ports: int) -> list[int]:
    """Returns ports of localhost that are free and that nothing else is given before they are used; each once in a process."""
    found: list[int] = []
    while len(found) < num_ports:
        port = next(_PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:  # a program of this machine has it
                continue
        found.append(port)
    return found


def _draw(shape: str, size: int, random: np.random.Generator) -> Image.Image:
    """Draws one shape of random place, size and colour on a noisy ground of another colour."""
    while True:
        ground, colour = random.integers(0, 256, (2, 3))
        if np.abs(ground - colour).max() > _MIN_CONTRAST:
            break
    noise = random.integers(-20, 21, (size, size, 3))
    image = Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))
    radius = random.uniform(0.22, 0.36) * size
    x, y = random.uniform(radius, size - radius, 2)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw, fill = ImageDraw.Draw(image), tuple(int(value) for value in colour)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        arm = radius / 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    return image


def _make_images(
    folder: Path,
    *,
    num_per_class: int = 40,
    class_names: Sequence[str] = CLASS_NAMES,
    size: int = 72,
    seed: int = 0,
) -> Path:
    random = np.random.default_rng(seed)
    for position, name in enumerate(class_names):
        shape = name if name in _SHAPES else _SHAPES[position % len(_SHAPES)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(num_per_class):
            suffix, options = (".jpg", {"quality": 95}) if number % 2 else (".png", {})
            _draw(shape, size, random).save(folder / name / f"{number:03d}{suffix}", **options)
    return folder


def trainer_config(cache_dir: str = "", **sections) -> Any:
    """A `TrainerConfig` of a network of random weights, so that nothing says how well it learns; settings change by section."""
    from models.trainer import TrainerConfig
    from preprocessing.images import InputSpec

    settings = {
        "model": {"weights": "random", "num_feature_maps": 2, "covariance": False, "hidden_units": 0, "num_components": 16},
        "training": {"epochs": 2, "batch_size": 16},
        "fine_tuning": {"epochs": 3, "batch_size": 8, "patience": 3},
        "augmentation": {"strength": "light"},
        "devices": {"accelerator": "cpu"},
        "export": {},
    }
    merged = {name: values | sections.get(name, {}) for name, values in settings.items()}
    return TrainerConfig(
        class_names=CLASS_NAMES,
        input=InputSpec(image_size=TRANSFORM_IMAGE_SIZE, interpolation="bicubic"),
        cache_dir=cache_dir,
        code="",
        **merged,
    )


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """Gives `make_images(folder, *, num_per_class, class_names, size, seed)`, which fills a folder per class.

    Half of the images are PNG, half are JPEG, of `size` pixels. A class is drawn as its name says (circle, square,
    triangle, cross), or as the shape at its place in the list. The same arguments give the same bytes.
    """
    return _make_images


@pytest.fixture(scope="session")
def make_csv() -> Callable[..., Path]:
    """Gives `make_csv(path, folder)`, which lists a folder per class as `path,label,camera`."""

    def make(path: Path, folder: Path, *, cameras: Sequence[str] = ("left", "right")) -> Path:
        images = sorted(file for file in folder.rglob("*") if file.is_file())
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "camera"])
            for number, image in enumerate(images):
                writer.writerow([os.path.relpath(image, path.parent), image.parent.name, cameras[number % len(cameras)]])
        return path

    return make


@pytest.fixture
def elpv_csv(tmp_path: Path) -> Path:
    """A CSV of 40 real images of the installed ELPV data set, 20 of each class, with the column `cell_type`."""
    from data.sources import ELPV_CLASS_NAMES, open_source

    source = open_source("elpv")
    path = tmp_path / "elpv.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "cell_type"])
        for name in ELPV_CLASS_NAMES:
            chosen = [reference for reference in source.references if reference.label == name][::40][:20]
            writer.writerows([reference.path, reference.label, *reference.columns] for reference in chosen)
    return path


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Gives `encode(image, format="PNG", **options)`: the encoded bytes of a Pillow image or a uint8 array."""

    def encode_image(image: Image.Image | np.ndarray, image_format: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture(scope="session")
def photograph() -> Path:
    """A real photograph: Grace Hopper in uniform, a JPEG of 512 by 600 pixels that matplotlib installs."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")


@pytest.fixture(scope="session")
def transform_graph(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]) -> str:
    """The graph that Transform makes of our `preprocessing_fn`, for `CLASS_NAMES` and 32 pixels."""
    import apache_beam as beam
    import tensorflow_transform.beam as tft_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from tensorflow_transform.tf_metadata import dataset_metadata, schema_utils

    from data.features import feature_spec
    from preprocessing.transform import preprocessing_fn

    folder = tmp_path_factory.mktemp("transform_graph")
    metadata = dataset_metadata.DatasetMetadata(schema_utils.schema_from_feature_spec(feature_spec()))
    spec = {"image_size": TRANSFORM_IMAGE_SIZE, "interpolation": "bicubic"}
    settings = {"input": spec, "class_names": list(CLASS_NAMES)}
    black = encode(np.zeros((4, 4, 3), np.uint8))
    record = {"image": black, "label": b"circle", "filename": b"black.png", "height": 4, "width": 4}
    record |= {"aspect": 1.0, "brightness": 0.0, "channels": 3}
    options = PipelineOptions(["--runner=FnApiRunner"])
    with (
        beam.Pipeline(options=options) as pipeline,
        tft_beam.Context(temp_dir=str(folder / "temporary"), force_tf_compat_v1=False),
    ):
        data = pipeline | "Make a record" >> beam.Create([record])
        transform_fn = (data, metadata) | "Trace" >> tft_beam.AnalyzeDataset(
            functools.partial(preprocessing_fn, custom_config=settings)
        )
        _ = transform_fn | "Write the graph" >> tft_beam.WriteTransformFn(str(folder / "graph"))
    return str(folder / "graph")


@pytest.fixture(scope="session")
def write_records(encode: Callable[..., bytes]) -> Callable[..., str]:
    """Gives `write_records(path, images, labels)`: writes uint8 images and their class names as gzipped records."""
    import tensorflow as tf

    from data.features import make_example

    def write(path: Path, images: Sequence[np.ndarray], labels: Sequence[str]) -> str:
        with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                height, width, _ = image.shape
                example = make_example(
                    image=encode(image),
                    label=label,
                    filename=f"{number}.png",
                    height=height,
                    width=width,
                    brightness=0.5,
                    channels=3,
                    columns={},
                )
                writer.write(example.SerializeToString())
        return str(path)

    return write


@pytest.fixture(scope="session")
def shape_records(tmp_path_factory: pytest.TempPathFactory, make_images: Callable, write_records: Callable) -> dict[str, str]:
    """Records of small shapes: 44 to train on, 18 to validate with."""
    folder = tmp_path_factory.mktemp("records")
    images = make_images(folder / "images", num_per_class=31, size=48)
    files = {name: sorted((images / name).iterdir()) for name in CLASS_NAMES}
    for split, chosen in (("train", slice(0, 22)), ("valid", slice(22, 31))):
        paths = [path for pair in zip(*(files[name][chosen] for name in CLASS_NAMES), strict=True) for path in pair]
        half = len(paths) // 2
        for shard, part in enumerate((paths[:half], paths[half:])):
            path = folder / f"{split}-{shard}.tfrecord.gz"
            write_records(path, [np.asarray(Image.open(one).convert("RGB")) for one in part], [one.parent.name for one in part])
    return {split: str(folder / f"{split}-*") for split in ("train", "valid")}
