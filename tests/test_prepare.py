import collections
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from PIL import Image
from tensorflow_metadata.proto.v0 import schema_pb2

from data import prepare, steps
from data.errors import InputError
from data.features import SPLITS, feature_spec
from data.prepare import DataConfig, read_class_names, read_report
from data.sources import Source, is_prepared, open_source
from data.splits import choose_split

FRACTIONS = ["--valid-fraction", "0.3", "--test-fraction", "0.3"]


def _main(source: Path, output: Path, *more: str) -> int:
    return prepare.main(["--input", str(source), "--output", str(output), *FRACTIONS, *more])


def _records(folder: Path, split: str, columns=()) -> list[dict]:
    files = sorted(str(path) for path in folder.glob(f"{split}-*.tfrecord.gz"))
    assert files
    dataset = tf.data.TFRecordDataset(files, compression_type="GZIP").batch(64)
    batches = dataset.map(lambda serialized: tf.io.parse_example(serialized, feature_spec(columns)))
    return [
        dict(zip(batch, values, strict=True))
        for batch in batches.as_numpy_iterator()
        for values in zip(*batch.values(), strict=True)
    ]


def _shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tfrecord.gz")}


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images) -> Path:
    return make_images(tmp_path_factory.mktemp("photos"), num_per_class=15, size=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, images) -> Path:
    """Records of `images`; tests only read them."""
    output = tmp_path_factory.mktemp("prepared") / "records"
    assert _main(images, output) == 0
    return output


@pytest.fixture
def own_images(tmp_path, make_images) -> Path:
    """Images that a test may change."""
    return make_images(tmp_path / "photos", num_per_class=15, size=16)


def test_main_writes_every_image_as_a_record_of_its_file(images, prepared):
    records = [record for split in SPLITS for record in _records(prepared, split)]

    by_file = {record["filename"].decode(): record for record in records}
    # Relative to the input, so that another machine writes the same records.
    assert set(by_file) == {str(path.relative_to(images)) for path in images.rglob("*.*")}
    assert len(records) == 30
    for file, record in by_file.items():
        assert record["image"] == (images / file).read_bytes()
        assert record["label"].decode() == Path(file).parent.name
        assert (record["height"], record["width"]) == (16, 16)


def test_main_decides_the_split_by_the_content(prepared):
    config = DataConfig(valid_fraction=0.3, test_fraction=0.3)
    for split in SPLITS:
        for record in _records(prepared, split):
            assert choose_split(hashlib.sha256(record["image"]).hexdigest(), config) == split


def test_main_reports_what_it_wrote(images, prepared):
    report = json.loads((prepared / "report.json").read_text())

    assert report["input"] == str(images)
    assert report["images"] == 30
    assert report["class_names"] == ["circle", "square"]
    assert (report["quarantined"], report["duplicates"], report["columns"]) == (0, [], [])
    for split in SPLITS:
        found = collections.Counter(record["label"].decode() for record in _records(prepared, split))
        assert report["counts"][split] == dict(found)
    assert report["shards"] == _shards(prepared)
    assert read_report(str(prepared)) == report


def test_main_leaves_the_files_of_the_contract(prepared):
    assert sorted(str(path.relative_to(prepared)) for path in prepared.rglob("*") if path.is_file()) == [
        "labels.txt",
        "quarantine.json",
        "report.html",
        "report.json",
        "schema/schema.pbtxt",
        "test-00000-of-00001.tfrecord.gz",
        "train-00000-of-00001.tfrecord.gz",
        "valid-00000-of-00001.tfrecord.gz",
    ]
    assert (prepared / "labels.txt").read_text() == "circle\nsquare\n"
    assert read_class_names(str(prepared)) == ("circle", "square")
    assert json.loads((prepared / "quarantine.json").read_text()) == []
    assert is_prepared(str(prepared))
    schema = text_format.Parse((prepared / "schema/schema.pbtxt").read_text(), schema_pb2.Schema())
    labels = next(feature for feature in schema.feature if feature.name == "label")
    assert list(labels.string_domain.value) == ["circle", "square"]


def test_main_says_what_it_did(images, tmp_path, capsys):
    output = tmp_path / "records"
    assert _main(images, output) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Preparing {images} ..."
    counts = read_report(str(output))["counts"]
    for line, split in zip(lines[1:4], SPLITS, strict=True):
        assert line == f"{split:>6}: {counts[split]['circle']} circle, {counts[split]['square']} square"
    assert lines[4] == "30 images in, 30 records out, 0 exact duplicates left out, 0 in quarantine"
    assert lines[5].startswith("warning: 2 classes have fewer than 10 valid images, too few to judge by: circle (")
    assert lines[-1] == f"Wrote {output}"


def test_main_writes_identical_shards_again_and_in_any_order(images, prepared, tmp_path, monkeypatch):
    assert _main(images, tmp_path / "again") == 0
    assert _shards(tmp_path / "again") == _shards(prepared)

    def reversed_source(location: str) -> Source:
        source = open_source(location)
        return dataclasses.replace(source, references=source.references[::-1])

    monkeypatch.setattr(prepare, "open_source", reversed_source)
    assert _main(images, tmp_path / "reversed") == 0
    assert _shards(tmp_path / "reversed") == _shards(prepared)


def test_main_spreads_over_shards_by_the_content(images, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "TARGET_SHARD_BYTES", 3_000)

    assert _main(images, tmp_path / "records") == 0

    shards = _shards(tmp_path / "records")
    train = [name for name in shards if name.startswith("train-")]
    assert len(train) > 1
    assert all(name.endswith(f"-of-{len(train):05d}.tfrecord.gz") for name in train)
    for split in SPLITS:
        files = {record["filename"] for record in _records(tmp_path / "records", split)}
        assert files == {record["filename"] for record in _records(prepared, split)}


def test_main_keeps_the_first_of_exact_duplicates(own_images, tmp_path, capsys):
    original = own_images / "circle/000.png"
    (own_images / "circle/yyy.png").write_bytes(original.read_bytes())
    (own_images / "circle/zzz.png").write_bytes(original.read_bytes())

    assert _main(own_images, tmp_path / "records") == 0

    report = read_report(str(tmp_path / "records"))
    assert report["duplicates"] == [
        {"file": str(own_images / f"circle/{name}.png"), "label": "circle", "same_as": str(original)} for name in ("yyy", "zzz")
    ]
    assert report["images"] == 32
    records = [record for split in SPLITS for record in _records(tmp_path / "records", split)]
    assert len(records) == 30
    assert [r["filename"].decode() for r in records if r["image"] == original.read_bytes()] == ["circle/000.png"]
    assert "2 exact duplicates left out" in capsys.readouterr().out


def test_main_leaves_out_an_image_under_two_labels(own_images, tmp_path):
    original = own_images / "circle/000.png"
    for place in ("circle/zzz.png", "square/zzz.png"):
        (own_images / place).write_bytes(original.read_bytes())

    assert _main(own_images, tmp_path / "records", "--max-quarantined-fraction", "0.2") == 0

    rows = json.loads((tmp_path / "records/quarantine.json").read_text())
    other = own_images / "square/zzz.png"
    assert [(row["file"], row["label"], row["reason"]) for row in rows] == [
        (str(original), "circle", f"the same image is labelled 'square' in {other}"),
        (str(own_images / "circle/zzz.png"), "circle", f"the same image is labelled 'square' in {other}"),
        (str(other), "square", f"the same image is labelled 'circle' in {original}"),
    ]
    records = [record for split in SPLITS for record in _records(tmp_path / "records", split)]
    assert len(records) == 29
    assert original.read_bytes() not in [record["image"] for record in records]


def test_main_quarantines_what_is_no_image_and_says_why(own_images, make_csv, tmp_path):
    (own_images / "circle/empty.png").write_bytes(b"")
    (own_images / "circle/text.jpg").write_text("this is no image")
    (own_images / "square/cut.png").write_bytes((own_images / "square/000.png").read_bytes()[:200])
    (own_images / "square/cut.jpg").write_bytes((own_images / "square/001.jpg").read_bytes()[:-300])
    csv = make_csv(tmp_path / "list.csv", own_images)
    with open(csv, "a") as file:
        file.write("photos/circle/missing.png,circle,left\nphotos/circle/002.png,triangle,left\nphotos,circle,left\n")
    (tmp_path / "labels.txt").write_text("circle\nsquare\n")

    assert _main(csv, tmp_path / "records", "--max-quarantined-fraction", "0.5") == 0

    rows = json.loads((tmp_path / "records/quarantine.json").read_text())
    by_place = {(Path(row["file"]).name, row["label"]): row for row in rows}
    assert set(by_place) == {
        ("empty.png", "circle"),
        ("text.jpg", "circle"),
        ("cut.png", "square"),
        ("cut.jpg", "square"),
        ("missing.png", "circle"),
        ("002.png", "triangle"),
        ("photos", "circle"),
    }
    assert by_place["empty.png", "circle"]["reason"] == "the file is empty"
    assert by_place["missing.png", "circle"]["reason"] == "there is no such file"
    assert by_place["missing.png", "circle"]["line"] == 36
    assert by_place["002.png", "triangle"]["reason"] == "the label 'triangle' is not in the list of classes"
    for place in (("text.jpg", "circle"), ("cut.png", "square"), ("cut.jpg", "square")):
        assert by_place[place]["reason"].startswith("it is ")
        assert "Op:" not in by_place[place]["reason"]
    assert by_place["text.jpg", "circle"]["reason"] == "it is no image of a known format"
    assert by_place["cut.jpg", "square"]["reason"].startswith("it is damaged")
    assert by_place["photos", "circle"]["reason"] == "it is a folder"
    report = read_report(str(tmp_path / "records"))
    assert (report["images"], report["quarantined"]) == (37, 7)
    assert sum(sum(counts.values()) for counts in report["counts"].values()) == 30


def test_main_refuses_too_large_a_share_in_quarantine(own_images, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (own_images / "circle" / name).write_bytes(b"")
    (own_images / "square/c.png").write_text("text")

    assert _main(own_images, tmp_path / "records") == 2

    error = capsys.readouterr().err
    assert error.startswith(
        "error: Expected at most 5% of the images to be unusable. Received: 3 of 33: 2 x the file is empty; 1 x it "
    )
    assert f"(first: {own_images / 'circle/a.png'}). Mend them, or raise data.max_quarantined_fraction." in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_main_names_the_line_of_the_first_unusable_image(own_images, make_csv, tmp_path, capsys):
    csv = make_csv(tmp_path / "list.csv", own_images)
    (own_images / "circle/000.png").unlink()

    assert _main(csv, tmp_path / "records", "--max-quarantined-fraction", "0") == 2

    error = capsys.readouterr().err
    assert "1 of 30: 1 x there is no such file" in error
    assert "circle/000.png, line 2)." in error


def test_main_refuses_a_split_without_a_class(tmp_path, own_images, capsys):
    csv = tmp_path / "list.csv"
    splits = {"circle": ["train", "valid", "test"], "square": ["train", "valid", "valid"]}
    rows = [
        f"photos/{label}/{number:03d}.png,{label},{split}"
        for label, names in splits.items()
        for number, split in zip((0, 2, 4), names, strict=True)
    ]
    csv.write_text("\n".join(rows))

    assert _main(csv, tmp_path / "records") == 2

    assert capsys.readouterr().err == (
        "error: Expected images of every class in every split. Received: none of class 'square' in 'test' (3 in all). "
        "Add images of it, remove the class, or raise data.valid_fraction and data.test_fraction.\n"
    )
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("wrong", "question"), [("squares", " Did you mean 'square'?"), ("Square", " Did you mean 'square'?"), ("tree", "")]
)
def test_main_asks_whether_a_label_is_a_typing_error(tmp_path, own_images, capsys, wrong, question):
    csv = tmp_path / "list.csv"
    paths = sorted(own_images.rglob("*.*"))
    labels = [wrong, *(path.parent.name for path in paths[1:])]
    csv.write_text("".join(f"{path},{label}\n" for path, label in zip(paths, labels, strict=True)))

    assert _main(csv, tmp_path / "records") == 2

    assert f"(1 in all).{question} Add images of it" in capsys.readouterr().err


def test_main_names_the_file_with_the_reasons_of_the_quarantine(tmp_path, own_images, capsys):
    (own_images / "circle" / "empty.png").touch()

    assert _main(own_images, tmp_path / "records") == 0

    assert f"Why     {tmp_path / 'records' / 'quarantine.json'}" in capsys.readouterr().out.splitlines()


def test_main_says_that_paths_in_a_csv_are_relative_to_it(tmp_path, own_images, capsys):
    csv = tmp_path / "list.csv"
    csv.write_text("".join(f"{path.relative_to(own_images)},{path.parent.name}\n" for path in own_images.rglob("*.*")))

    assert _main(csv, tmp_path / "records") == 2

    assert "x there is no such file" in (line := capsys.readouterr().err)
    assert line.endswith("Paths in a CSV are relative to its folder.\n")


def test_main_lets_a_split_column_win_over_the_content(tmp_path, own_images):
    csv = tmp_path / "list.csv"
    rows = [(path, SPLITS[number % 3]) for number, path in enumerate(sorted(own_images.rglob("*.*")))]
    csv.write_text("\n".join(f"{path},{path.parent.name},{split}" for path, split in rows))

    assert _main(csv, tmp_path / "records") == 0

    for split in SPLITS:
        files = {record["filename"].decode() for record in _records(tmp_path / "records", split)}
        assert files == {str(path.relative_to(tmp_path)) for path, chosen in rows if chosen == split}


def test_main_writes_the_extra_columns(own_images, make_csv, tmp_path):
    csv = make_csv(tmp_path / "list.csv", own_images)

    assert _main(csv, tmp_path / "records") == 0

    cameras = {
        str(Path(reference.path).relative_to(tmp_path)): reference.columns[0] for reference in open_source(str(csv)).references
    }
    records = [record for split in SPLITS for record in _records(tmp_path / "records", split, ["camera"])]
    assert {record["filename"].decode(): record["camera"].decode() for record in records} == cameras
    assert read_report(str(tmp_path / "records"))["columns"] == ["camera"]


def test_main_prepares_real_images(elpv_csv, tmp_path):
    assert _main(elpv_csv, tmp_path / "records") == 0

    records = [record for split in SPLITS for record in _records(tmp_path / "records", split, ["cell_type"])]
    assert len(records) == 40
    assert {(record["height"], record["width"]) for record in records} == {(300, 300)}


def test_main_reuses_what_has_not_changed(images, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}

    assert _main(images, prepared) == 0

    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert capsys.readouterr().out.splitlines()[-1] == f"Nothing changed; kept {prepared}"


def test_main_refuses_a_folder_with_other_records(images, prepared, tmp_path, capsys):
    output = tmp_path / "records"
    output.mkdir()
    (output / "precious.txt").write_text("mine")

    assert _main(images, output) == 2

    assert capsys.readouterr().err == (
        f"error: Expected `--output` to be a folder that does not exist yet. Received: {str(output)!r}. "
        "Name another one, or replace its records with --overwrite.\n"
    )
    assert (output / "precious.txt").read_text() == "mine"


def test_main_overwrites_changed_records_when_told(own_images, tmp_path, capsys):
    output = tmp_path / "records"
    assert _main(own_images, output) == 0
    (own_images / "circle/014.png").unlink()
    assert _main(own_images, output) == 2
    assert read_report(str(output))["images"] == 30

    assert _main(own_images, output, "--overwrite") == 0

    assert read_report(str(output))["images"] == 29
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "records"]


def test_prepare_keeps_the_shards_where_the_records_come_out_the_same(own_images, tmp_path):
    # A file's time alone has changed: what is behind the records in the pipeline need not run again.
    config = DataConfig(input=str(own_images), valid_fraction=0.3, test_fraction=0.3)
    output = tmp_path / "records"
    assert not prepare.prepare(config, str(output))["reused"]
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord.gz")}
    (own_images / "circle/000.png").touch()

    report = prepare.prepare(config, str(output), overwrite=True)

    assert report["reused"]
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.tfrecord.gz")} == before
    assert prepare.prepare(config, str(output))["fingerprint"] == report["fingerprint"]


def test_prepare_draws_another_split_with_another_salt(images, prepared, tmp_path):
    config = DataConfig(input=str(images), valid_fraction=0.3, test_fraction=0.3, split_salt="another")

    prepare.prepare(config, str(tmp_path / "records"))

    assert {r["filename"] for r in _records(tmp_path / "records", "test")} != {
        r["filename"] for r in _records(prepared, "test")
    }


def test_main_leaves_no_folder_after_a_failure_in_the_middle(images, tmp_path, capsys):
    assert _main(images, tmp_path / "records", "--", "--runner=NoSuchRunner") == 1

    assert "NoSuchRunner" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--runner=DataflowRunner"], ["--runner", "dataflow"], ["--runner=SparkRunner"]])
def test_main_refuses_an_output_that_the_workers_cannot_reach(tmp_path, capsys, options):
    assert prepare.main(["--input", "gs://bucket/photos", "--output", str(tmp_path / "new/records"), "--", *options]) == 2

    error = capsys.readouterr().err
    assert error.startswith("error: Expected images and records in a bucket, as the workers of ")
    assert f"cannot read this machine's disk. Received: --output '{tmp_path}/new/records'. Copy them there" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no lock and no folder either


@pytest.mark.parametrize("kind", ["folder", "elpv", "csv", "records"])
def test_main_refuses_images_that_the_workers_cannot_reach(images, prepared, make_csv, tmp_path, capsys, kind):
    sources = {"folder": images, "elpv": "elpv", "csv": make_csv(tmp_path / "list.csv", images), "records": prepared}

    assert _main(sources[kind], "gs://bucket/records", "--", "--runner=DataflowRunner", "--project=p") == 2

    error = capsys.readouterr().err
    assert f"as the workers of DataflowRunner cannot read this machine's disk. Received: the input '{sources[kind]}', " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("gs://bucket/photos/1.png", ["--runner=DataflowRunner"]),  # as in a CSV on this machine, which is read here
        ("photos/1.png", []),
        ("photos/1.png", ["--runner=DirectRunner"]),
        ("photos/1.png", ["--runner=FlinkRunner", "--environment_type=LOOPBACK"]),
        ("photos/1.png", ["--runner=spark", "--environment_type=PROCESS"]),
    ],
)
def test_check_reach_allows_what_the_workers_can_read(path, options):
    prepare._check_reach([path], options, received="")


def test_main_keeps_the_old_records_after_a_failure_in_the_middle(own_images, tmp_path):
    output = tmp_path / "records"
    assert _main(own_images, output) == 0
    before = _shards(output)
    for path in (own_images / "circle").glob("*.png"):
        path.write_bytes(b"")

    assert _main(own_images, output, "--overwrite") == 2

    assert _shards(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "records"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--valid-fraction", "0.6", "--test-fraction", "0.4"],
            "Expected `valid_fraction` + `test_fraction` to be below 1, as the rest is trained on. Received: "
            "0.6 + 0.4. Take the defaults, 0.1 and 0.1.",
        ),
        (
            ["--valid-fraction", "0"],
            "Expected `valid_fraction` to be valid. Received: valid_fraction=0.0. Input should be greater than 0.",
        ),
        (
            ["--max-quarantined-fraction", "1.5"],
            "Expected `max_quarantined_fraction` to be valid. Received: max_quarantined_fraction=1.5. "
            "Input should be less than or equal to 1.",
        ),
    ],
)
def test_main_explains_wrong_settings(images, tmp_path, capsys, arguments, message):
    assert _main(images, tmp_path / "records", *arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_main_explains_a_missing_input_in_one_line(tmp_path, capsys):
    assert _main(tmp_path / "nowhere", tmp_path / "records") == 2

    error = capsys.readouterr().err
    assert error.startswith("error: Expected `data.input` to be a folder")
    assert error.count("\n") == 1


def test_main_shows_the_traceback_when_asked(tmp_path, capsys):
    assert _main(tmp_path / "nowhere", tmp_path / "records", "--debug") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("digest", "split"),
    [
        ("0" * 64, "test"),
        ("1" + "f" * 63, "test"),
        ("2" + "0" * 63, "valid"),
        ("7" + "f" * 63, "valid"),
        ("8" + "0" * 63, "train"),
        ("f" * 64, "train"),
    ],
)
def test_choose_split_divides_the_range_of_digests(digest, split):
    assert choose_split(digest, DataConfig(test_fraction=0.125, valid_fraction=0.375)) == split


def test_choose_split_gives_each_split_its_share():
    config = DataConfig(test_fraction=0.1, valid_fraction=0.2, split_salt="salt")
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(5000)]

    shares = collections.Counter(choose_split(digest, config) for digest in digests)

    # Four standard deviations of a binomial share of 5,000.
    np.testing.assert_allclose([shares[split] / 5000 for split in SPLITS], [0.7, 0.2, 0.1], atol=0.026)


def test_prepare_raises_for_an_unusable_source(tmp_path):
    with pytest.raises(InputError, match="which does not exist"):
        prepare.prepare(DataConfig(input=str(tmp_path / "nowhere")), str(tmp_path / "records"))


def test_read_report_gives_none_where_there_is_none(tmp_path):
    assert read_report(str(tmp_path)) is None


def test_main_never_overwrites_what_it_has_not_written(own_images, capsys):
    before = {path: path.read_bytes() for path in own_images.rglob("*") if path.is_file()}

    assert _main(own_images, own_images, "--overwrite") == 2

    assert "which holds something else. Name another folder." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in own_images.rglob("*") if path.is_file()} == before


def test_main_writes_a_deleted_shard_again(own_images, tmp_path):
    output = tmp_path / "records"
    assert _main(own_images, output) == 0
    before = _shards(output)
    next(output.glob("train-*")).unlink()

    assert _main(own_images, output, "--overwrite") == 0

    assert _shards(output) == before


def test_main_refuses_an_image_in_two_splits(own_images, tmp_path, capsys):
    rows = [f"{path},{path.parent.name},train" for path in sorted(own_images.glob("*/*"))]
    rows.append(rows[0].removesuffix("train") + "test")
    (tmp_path / "photos.csv").write_text("\n".join(rows))

    assert _main(tmp_path / "photos.csv", tmp_path / "records") == 2

    error = capsys.readouterr().err
    assert "Expected every image in one split." in error
    assert "the same image" in error
    assert not (tmp_path / "records").exists()


def test_main_applies_a_lower_quarantine_limit_to_the_records_it_has(own_images, tmp_path):
    (own_images / "circle" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "records"
    assert _main(own_images, output) == 0

    assert _main(own_images, output, "--overwrite", "--max-quarantined-fraction", "0") == 2


def test_read_report_gives_none_for_a_file_of_another_program(tmp_path):
    for content in ("not json", "{}", "[1]"):
        (tmp_path / "report.json").write_text(content)
        assert read_report(str(tmp_path)) is None


def test_prepare_clears_up_after_a_killed_preparation(own_images, tmp_path):
    output = tmp_path / "records"
    assert _main(own_images, output) == 0
    output.rename(tmp_path / "records.old-another-999999999")  # killed between the two renames of an overwrite
    (tmp_path / "records.tmp-another-999999998").mkdir()

    assert _main(own_images, output) == 0  # nothing changed: the old records are back and kept

    assert [path.name for path in tmp_path.glob("records*")] == ["records"]


def test_second_preparation_at_once_is_kept_out(own_images, tmp_path, capsys):
    with prepare._locked(str(tmp_path / "records")):
        assert _main(own_images, tmp_path / "records") == 1

    assert "to be free. Received: another preparation at work." in capsys.readouterr().err
    assert _main(own_images, tmp_path / "records") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "records"]


def test_overwrite_keeps_what_is_not_ours(own_images, tmp_path, capsys):
    output = tmp_path / "records"
    assert _main(own_images, output) == 0
    (output / "notes.txt").write_text("mine")
    (own_images / "circle/000.png").unlink()

    assert _main(own_images, output, "--overwrite") == 2

    assert "to hold records and nothing else, as all of it is replaced. Received: notes.txt." in capsys.readouterr().err
    assert (output / "notes.txt").read_text() == "mine"


def test_overwrite_follows_a_link(own_images, tmp_path):
    target = tmp_path / "disk/records"
    assert _main(own_images, target) == 0
    (tmp_path / "link").symlink_to(target)
    (own_images / "circle/000.png").unlink()

    assert _main(own_images, tmp_path / "link", "--overwrite") == 0

    assert (tmp_path / "link").is_symlink()
    assert read_report(str(target))["images"] == 29


def test_folder_names_may_have_wildcards(make_images, tmp_path):
    source = make_images(tmp_path / "photos [1] *?", num_per_class=15, size=16)

    assert _main(source, tmp_path / "records [1] *?") == 0
    assert is_prepared(str(tmp_path / "records [1] *?"))
    assert _main(source, tmp_path / "records [1] *?") == 0


def test_a_fixed_camera_does_not_fill_one_split(make_images, encode, tmp_path):
    source = make_images(tmp_path / "photos", num_per_class=15, size=40)
    background = np.asarray(Image.open(source / "circle/000.png"))
    for number in range(60):
        frame = background.copy()
        frame[0, number % 40] = number
        (source / "square" / f"frame{number}.png").write_bytes(encode(frame))

    assert _main(source, tmp_path / "records") == 0

    report = read_report(str(tmp_path / "records"))
    (group,) = report["near_duplicates"]
    assert len(group["files"]) > 50
    assert not any(file["moved_from"] for file in group["files"])
    assert any("look alike, too many for one split" in warning for warning in report["warnings"])
    assert all(counts["square"] > 5 for counts in report["counts"].values())
