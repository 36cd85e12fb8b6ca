"""Whole preparations of hostile data: every file becomes a record of the right pixels, or is quarantined with its reason."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from PIL import ExifTags, Image

from data.features import SPLITS, feature_spec
from data.prepare import DataConfig, prepare
from data.sources import open_source

pytestmark = pytest.mark.one_stack

FRACTIONS = {"valid_fraction": 0.3, "test_fraction": 0.3}
NAMES = [
    "plain.png",
    "with space.png",
    "comma, and 'quotes' \"double\".png",
    "new\nline.png",
    "Grüße-花-🌷-صورة.png",
    "percent%20#hash?question*star[1].png",
    "-dash.png",
    "back\\slash.png",
    "NO_SUFFIX",
    "wrong_suffix.jpg",
    "tab\tand\rreturn.png",
    "a" * 240 + ".png",
]


def records(folder: Path, columns=()) -> list[dict]:
    files = sorted(str(path) for path in folder.glob("*.tfrecord.gz"))
    dataset = tf.data.TFRecordDataset(files, "GZIP").map(lambda one: tf.io.parse_single_example(one, feature_spec(columns)))
    return list(dataset.as_numpy_iterator())


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tfrecord.gz"))}


def quarantine(folder: Path) -> list[dict]:
    return json.loads((folder / "quarantine.json").read_text())


def pixels(encoded: bytes) -> np.ndarray:
    return tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy().astype(int)


@pytest.fixture(scope="module")
def corpus(make_images, encode, tmp_path_factory) -> tuple[Path, dict[bytes, np.ndarray], dict[bytes, str]]:
    """A folder per class; by file name, the pixels of what is usable and the reason of what is not."""
    root = make_images(tmp_path_factory.mktemp("hostile") / "photos", num_per_class=30, size=40)
    folder = os.fsencode(root / "circle")
    random = np.random.default_rng(7)
    good, bad = {}, {}

    def motif() -> np.ndarray:
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        return np.asarray(small.resize((40, 32), Image.Resampling.BICUBIC))

    def keep(name: bytes, image: np.ndarray, encoded: bytes) -> None:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(encoded)
        good[name] = image

    def reject(name: bytes, encoded: bytes, reason: str) -> None:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(encoded)
        bad[name] = reason

    for name in NAMES:
        keep(name.encode(), image := motif(), encode(image))
    keep(b"latin-1 \xe9\xff.png", image := motif(), encode(image))
    for image_format, options in {
        "BMP": {},
        "GIF": {},
        "WEBP": {"lossless": True},
        "TIFF": {"compression": "tiff_deflate"},
        "PPM": {},
        "JPEG": {"quality": 98, "subsampling": 0, "progressive": True},
    }.items():
        image = motif()
        keep(f"format.{image_format}".encode(), image, encode(image, image_format, **options))
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    image = motif()
    keep(b"rotated.jpg", image, encode(np.rot90(image).copy(), "JPEG", exif=rotated, quality=98, subsampling=0))
    image = motif()
    keep(b"cmyk.jpg", image, encode(Image.fromarray(image).convert("CMYK"), "JPEG", quality=98, subsampling=0))
    reject(b"empty.png", b"", "the file is empty")
    reject(b"text.png", b"<html>404</html>", "it is no image of a known format")
    reject(b"small.png", encode(np.zeros((3, 3, 3), np.uint8)), "it has 3 x 3 pixels; the shorter side must have 8")
    reject(b"cut.png", encode(motif())[:300], "it is damaged or cut off")
    reject(b"cut.jpg", encode(motif(), "JPEG")[:-200], "it is damaged or cut off")
    reject(b"cut.gif", encode(motif(), "GIF")[:-200], "it is damaged or cut off")
    reject(b".DS_Store.png", b"", "")
    del bad[b".DS_Store.png"]  # hidden files are passed over
    os.symlink("nowhere.png", os.path.join(folder, b"broken link.png"))
    bad[b"broken link.png"] = "there is no such file"
    os.mkfifo(os.path.join(folder, b"pipe.png"))
    bad[b"pipe.png"] = "it is no regular file"
    os.symlink(folder, os.path.join(folder, b"loop"))
    return root, good, bad


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("output") / "records"
    config = DataConfig(input=str(corpus[0]), max_quarantined_fraction=0.5, **FRACTIONS)
    return output, prepare(config, str(output))


def test_every_usable_file_becomes_a_record_of_its_pixels(corpus, prepared):
    root, good, _ = corpus
    found = {os.path.basename(record["filename"]): record for record in records(prepared[0])}
    drawn = {path.name.encode() for path in root.glob("*/[0-9]*")}
    assert drawn <= set(found)
    assert set(good) <= set(found)
    for name, image in good.items():
        difference = np.abs(pixels(found[name]["image"]) - image).mean()
        # GIF has 256 colours; JPEG, and above all CMYK, rounds.
        assert difference <= {b".GIF": 8, b".jpg": 4, b"JPEG": 4}.get(name[-4:], 0), name
        assert (found[name]["height"], found[name]["width"]) == image.shape[:2]


def test_every_other_file_is_quarantined_with_its_reason(corpus, prepared):
    rows = {os.path.basename(os.fsencode(row["file"])): row for row in quarantine(prepared[0])}
    for name, reason in corpus[2].items():
        assert rows[name]["reason"].startswith(reason), name
        assert rows[name]["label"] == "circle"


def test_nothing_is_lost(corpus, prepared):
    _, good, bad = corpus
    output, report = prepared
    num_records = sum(sum(counts.values()) for counts in report["counts"].values())
    assert num_records == len(records(output))
    assert report["images"] == 60 + len(good) + len(bad)
    assert (num_records, report["quarantined"], report["duplicates"]) == (60 + len(good), len(bad), [])


def test_report_page_survives_the_names(prepared):
    page = (prepared[0] / "report.html").read_text(encoding="utf-8")
    assert "it is no image of a known format" in page


def test_csv_gives_the_same_records_by_any_kind_of_path(make_images, encode, tmp_path, monkeypatch):
    root = make_images(tmp_path / "photos", num_per_class=20, size=40)
    for name in NAMES:
        encoded = encode(np.random.default_rng(len(name)).integers(0, 256, (20, 20, 3), np.uint8))
        (root / "circle" / name).write_bytes(encoded)
    files = [(path, path.parent.name) for path in sorted(root.glob("*/*"))]
    expected = None
    writers = {
        "relative.csv": lambda path: os.path.relpath(path, tmp_path),
        "absolute.csv": str,
    }
    for name, write in writers.items():
        for bom in ("", "\ufeff"):
            with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
                file.write(bom)
                csv.writer(file).writerows((write(path), label) for path, label in files)
            found = shards_of(tmp_path / f"{name}{bool(bom)}", str(tmp_path / name))
            expected = expected or found
            assert found == expected
    monkeypatch.chdir(tmp_path)
    assert len(open_source("relative.csv").references) == len(files)


def shards_of(output: Path, source: str, *, beam_args=(), **settings) -> dict[str, str]:
    prepare(DataConfig(input=source, **FRACTIONS, **settings), str(output), beam_args=beam_args)
    return shards(output)


def test_another_runner_in_several_processes_writes_the_same_bytes(make_images, tmp_path):
    source = str(make_images(tmp_path / "photos", num_per_class=300, size=24))
    expected = shards_of(tmp_path / "one", source, num_readers=3)
    assert len(expected) == 9
    worker = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
    several = [
        "--runner=PortableRunner",
        "--job_endpoint=embed",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={worker}",
        "--sdk_worker_parallelism=2",
    ]

    assert shards_of(tmp_path / "several", source, beam_args=several, num_readers=3) == expected


# Prepares, and is killed when a function has done its work for the first time.
KILLED = """
import importlib, os, signal, sys
from data import prepare

module, function = sys.argv.pop(1).split(":")
module = importlib.import_module(module)
original = getattr(module, function)

def work_and_die(*arguments, **options):
    original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, function, work_and_die)
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("function", "sign"),  # what returns never, and what is there then
    [
        ("data.prepare:_write_listings", "listings/000000.json"),
        ("data.steps:_record", "parts/*"),
        ("data.prepare:_read_results", "results/*"),
        ("data.prepare:_write_json", "schema/schema.pbtxt"),
        ("data.prepare:write_data_report", "report.json"),
    ],
)
def test_killed_preparation_ends_the_same_when_run_again(make_images, tmp_path, function, sign):
    source = make_images(tmp_path / "photos", num_per_class=150, size=60)
    output = tmp_path / "records"
    arguments = ["--input", str(source), "--output", str(output), "--valid-fraction", "0.3", "--test-fraction", "0.3"]
    command = [sys.executable, "-c", KILLED, function, *arguments]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(f"records.tmp-*/{sign}"))
    assert not output.exists()

    report = prepare(DataConfig(input=str(source), **FRACTIONS), str(output))

    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("records")] == ["records"]
    assert report["images"] == 300
    assert shards(output) == shards_of(tmp_path / "whole", str(source))


def float_record(pixels: np.ndarray, label: str, **changes) -> bytes:
    """A record of the kind that the book publishes."""
    features = {
        "image": tf.train.Feature(float_list=tf.train.FloatList(value=(pixels / 255).astype(np.float32).ravel())),
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=pixels.shape)),
        "label": tf.train.Feature(bytes_list=tf.train.BytesList(value=[label.encode()])),
        "label_int": tf.train.Feature(int64_list=tf.train.Int64List(value=[0])),
    }
    features.update(changes)
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_tfrecords(path: Path, serialized: list[bytes], compression: str = "GZIP") -> None:
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in serialized:
            writer.write(record)


@pytest.mark.parametrize("has_class_list", [True, False])
def test_float_records_of_the_book_become_encoded_images(make_images, tmp_path, has_class_list):
    folder = make_images(tmp_path / "photos", num_per_class=12, size=24)
    images = [(np.asarray(Image.open(path).convert("RGB")), path.parent.name) for path in sorted(folder.glob("*/*"))]
    source = tmp_path / "flowers_tfr"
    source.mkdir()
    for number, split in enumerate(SPLITS):
        some = [float_record(image, label) for image, label in images[number::3]]
        write_tfrecords(source / f"{split}-00000-of-00001.gz", some)
    if has_class_list:
        (source / "dict.txt").write_text("square\ncircle\n")

    report = prepare(DataConfig(input=str(source)), str(tmp_path / "records"))

    assert report["images"] == 24
    assert report["class_names"] == (["square", "circle"] if has_class_list else ["circle", "square"])
    assert {split: sum(counts.values()) for split, counts in report["counts"].items()} == dict.fromkeys(SPLITS, 8)
    found = sorted(pixels(record["image"]).tobytes() for record in records(tmp_path / "records"))
    assert found == sorted(image.astype(int).tobytes() for image, _ in images)


def test_records_that_cannot_be_used_are_quarantined(make_images, encode, tmp_path):
    folder = make_images(tmp_path / "photos", num_per_class=30, size=24)
    images = [(np.asarray(Image.open(path).convert("RGB")), path.parent.name) for path in sorted(folder.glob("*/*"))]
    source = tmp_path / "tfr"
    source.mkdir()
    image = images[0][0]
    empty = tf.train.Feature()
    too_large = tf.train.Feature(float_list=tf.train.FloatList(value=np.full(image.size, 255.0)))
    not_a_number = tf.train.Feature(float_list=tf.train.FloatList(value=np.full(image.size, np.nan)))
    hostile = {
        "the record is no tf.Example": b"\xff\xff\xff",
        "the record has no `label`": float_record(image, ""),
        "the record has no `image`": float_record(image, "circle", image=empty),
        "the record has 1728 floats and the `shape` []": float_record(image, "circle", shape=empty),
        "the record's floats lie in [255, 255], not in [0, 1]": float_record(image, "circle", image=too_large),
        "the record's floats lie in [nan, nan], not in [0, 1]": float_record(image, "circle", image=not_a_number),
        "the label 'hexagon' is not in the list of classes": float_record(image, "hexagon"),
    }
    write_tfrecords(source / "a.tfrecord", [float_record(*one) for one in images] + list(hostile.values()), "")
    cut = source / "b.tfrecord.gz"
    write_tfrecords(cut, [float_record(255 - one, label) for one, label in images])
    cut.write_bytes(cut.read_bytes()[:-4000])
    (source / "labels.txt").write_text("circle\nsquare\n")

    report = prepare(DataConfig(input=str(source), max_quarantined_fraction=0.5, **FRACTIONS), str(tmp_path / "records"))

    whole = sum(
        pixels(record["image"]).tobytes() in {one.astype(int).tobytes() for one, _ in images}
        for record in records(tmp_path / "records")
    )
    assert whole == 60
    from_the_cut_file = len(records(tmp_path / "records")) - 60
    assert 0 < from_the_cut_file < 60
    assert report["warnings"][0] == f"{cut} is damaged: what follows its record {from_the_cut_file} is lost."
    reasons = {row["reason"]: row["file"] for row in quarantine(tmp_path / "records")}
    for number, start in enumerate(hostile):
        (place,) = [file for reason, file in reasons.items() if reason.startswith(start)]
        assert place == f"{source / 'a.tfrecord'}#{61 + number}"
    assert any(reason.startswith("the file is damaged after record ") for reason in reasons)


def test_own_records_are_a_source_that_keeps_its_splits_and_columns(make_images, make_csv, tmp_path):
    source = make_csv(tmp_path / "list.csv", make_images(tmp_path / "photos", num_per_class=20, size=24))
    first = prepare(DataConfig(input=str(source), split_salt="x", **FRACTIONS), str(tmp_path / "first"))

    second = prepare(DataConfig(input=str(tmp_path / "first")), str(tmp_path / "second"))

    assert second["counts"] == first["counts"]
    assert second["columns"] == ["camera"]
    assert shards(tmp_path / "second") == shards(tmp_path / "first")


def test_images_that_look_alike_end_in_one_split(make_images, encode, photograph, tmp_path):
    source = make_images(tmp_path / "photos", num_per_class=20, size=40)
    with Image.open(photograph) as original:
        for number in range(12):
            smaller = original.resize((512 - 20 * number, 600 - 22 * number), Image.Resampling.LANCZOS)
            (source / "circle" / f"hopper{number}.jpg").write_bytes(encode(smaller, "JPEG", quality=95 - 2 * number))

    report = prepare(DataConfig(input=str(source), **FRACTIONS), str(tmp_path / "joined"))
    (group,) = report["near_duplicates"]
    assert len(group["files"]) == 12
    assert any(file["moved_from"] for file in group["files"])
    assert report["warnings"][-1].startswith("1 group")
    found = {split: set() for split in SPLITS}
    for split in SPLITS:
        for path in (tmp_path / "joined").glob(f"{split}-*"):
            for one in tf.data.TFRecordDataset(str(path), "GZIP"):
                features = tf.train.Example.FromString(one.numpy()).features.feature
                found[split].add(os.path.basename(features["filename"].bytes_list.value[0]).decode())
    assert [split for split in SPLITS if any("hopper" in name for name in found[split])] == [group["split"]]

    apart = prepare(DataConfig(input=str(source), join_near_duplicates=False, **FRACTIONS), str(tmp_path / "apart"))
    assert apart["near_duplicates"] == []


def test_large_photographs_are_shrunk_once(make_images, encode, photograph, tmp_path):
    source = make_images(tmp_path / "photos", num_per_class=20, size=40)
    shutil.copy(photograph, source / "circle")

    report = prepare(DataConfig(input=str(source), max_side=200, **FRACTIONS), str(tmp_path / "records"))

    assert report["facts"]["height"]["max"] == 200
    assert report["converted"] == {"shrunk to 200 pixels": 1}


def test_own_schema_takes_the_place_of_the_generated_one(make_images, tmp_path, capsys):
    from data import prepare as module

    source = make_images(tmp_path / "photos", num_per_class=20, size=24)
    output = tmp_path / "records"
    arguments = ["--input", str(source), "--output", str(output), "--valid-fraction", "0.3", "--test-fraction", "0.3"]
    level = module.logger.level
    assert module.main(arguments) == 0
    assert module.logger.level == level
    written = output / "schema/schema.pbtxt"
    edited = tmp_path / "schema.pbtxt"
    edited.write_text(written.read_text().replace("max: 4", "max: 3"))
    assert edited.read_text() != written.read_text()

    # An edit in place is not lost, neither by a rerun that keeps the records nor by one that would write them anew.
    shutil.copy(edited, written)
    assert module.main(arguments) == 0
    make_images(source, num_per_class=21, size=24)
    assert module.main([*arguments, "--overwrite"]) == 2
    assert "Received: an edited one. Copy it to a place of your own" in capsys.readouterr().err
    assert written.read_text() == edited.read_text()

    assert module.main([*arguments, "--overwrite", "--schema-file", str(edited)]) == 0
    assert "max: 3" in written.read_text()

    edited.write_text("feature { name: 'image' }")
    assert module.main([*arguments, "--overwrite", "--schema-file", str(edited)]) == 2
    assert "Received: nothing of aspect, brightness" in capsys.readouterr().err
    edited.write_text("this is no schema")
    assert module.main([*arguments, "--overwrite", "--schema-file", str(edited)]) == 2
    assert "to be a schema in text form" in capsys.readouterr().err


def test_urls_give_the_same_records_as_paths(make_images, tmp_path):
    """`file://` takes the road of gs://, through TensorFlow's file systems, object by object."""
    source = make_images(tmp_path / "photos", num_per_class=20, size=24)
    expected = shards_of(tmp_path / "local", str(source))
    url = f"file://{tmp_path}/remote"

    first = prepare(DataConfig(input=f"file://{source}", **FRACTIONS), url)
    assert shards(tmp_path / "remote") == expected
    assert prepare(DataConfig(input=f"file://{source}", **FRACTIONS), url)["reused"]

    (source / "circle/000.png").unlink()
    second = prepare(DataConfig(input=f"file://{source}", **FRACTIONS), url, overwrite=True)
    assert (first["images"], second["images"]) == (40, 39)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "photos", "remote"]
