import base64
import html.parser
import io
import json
import re
import warnings

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from data.features import SPLITS, TRAIN_SPLIT, make_example
from data.prepare import DataConfig, prepare
from data.report import write_data_report

FACTS = {
    "height": {"min": 72, "median": 72.0, "max": 1500},
    "width": {"min": 72, "median": 80.5, "max": 72},
    "brightness": {"min": 0.1, "median": 0.456, "max": 0.9},
    "bytes": {"min": 999, "median": 12_345, "max": 12_345_678},
}
MAX_PAGE_BYTES = 3_000_000
VOID_TAGS = ("meta", "img", "br", "wbr")


class _Page(html.parser.HTMLParser):
    """Reads a page: its text, its tags, its pictures (alt, image), what it loads, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.source = text
        self.loaded, self.tags, self.pictures, self._words, self._open = [], [], [], [], []
        self.feed(text)
        assert self._open == []
        self.text = " ".join("".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID_TAGS:
            self._open.append(tag)
        if tag in ("td", "th", "tr", "h2", "h3", "li", "p", "caption"):
            self._words.append(" ")
        self.loaded += [attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        if tag == "img":
            head, _, encoded = attributes["src"].partition(",")
            assert head == "data:image/jpeg;base64"
            self.pictures.append((attributes["alt"], Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self._words.append(data)


def _make_report(counts: dict[str, dict[str, int]], **others) -> dict:
    """Makes what `data.prepare` would report of these counts, so that the numbers add up."""
    report = {
        "input": "photos",
        "class_names": list(counts[TRAIN_SPLIT]),
        "columns": [],
        "counts": counts,
        "quarantined": 0,
        "duplicates": [],
        "near_duplicates": [],
        "warnings": [],
        "facts": FACTS,
        "column_counts": {},
        "converted": {},
        "shards": {},
        "fingerprint": "f1e2",
    } | others
    records = sum(sum(split.values()) for split in counts.values())
    return {"images": records + len(report["duplicates"]) + report["quarantined"]} | report


def _write(folder, report: dict, quarantine: list[dict] = ()) -> _Page:
    write_data_report(str(folder), report, list(quarantine))
    return _Page((folder / "report.html").read_text(encoding="utf-8"))


def _counts(*class_names: str, train: int = 8) -> dict[str, dict[str, int]]:
    numbers = {"train": train, "valid": 1, "test": 2}
    return {split: dict.fromkeys(class_names, numbers[split]) for split in SPLITS}


def _write_shard(path, images: list[tuple[bytes, str, str]]) -> None:
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
        for image, label, filename in images:
            example = make_example(
                image=image, label=label, filename=filename, height=1, width=1, brightness=0.5, channels=3, columns={}
            )
            writer.write(example.SerializeToString())


@pytest.fixture(scope="module")
def prepared(make_images, tmp_path_factory):
    """Records of two classes as `data.prepare` writes them, with its report."""
    folder = tmp_path_factory.mktemp("prepared")
    make_images(folder / "photos", num_per_class=30)
    report = prepare(DataConfig(input=str(folder / "photos"), valid_fraction=0.2, test_fraction=0.2), str(folder / "records"))
    rest = {"near_duplicates": [], "warnings": [], "facts": FACTS, "column_counts": {}, "converted": {}}
    return folder / "records", rest | report


def test_write_data_report_of_prepared_records_shows_the_counts_given(prepared):
    folder, report = prepared
    page = _write(folder, report)

    assert "60 images in = 60 records + 0 exact duplicates left out + 0 in quarantine. 2 classes." in page.text
    for name in report["class_names"]:
        numbers = [report["counts"][split][name] for split in SPLITS]
        assert f" {name} {' '.join(map(str, numbers))} {sum(numbers)} 50.0 %" in page.text
    totals = [sum(report["counts"][split].values()) for split in SPLITS]
    assert f"all classes {' '.join(map(str, totals))} 60" in page.text
    assert "Empty: every image listed could be used." in page.text
    assert report["fingerprint"] in page.text
    for name, digest in report["shards"].items():
        assert f"{name} {digest}" in page.text


def test_write_data_report_shows_the_first_train_images_of_each_class(prepared):
    folder, report = prepared
    page = _write(folder, report)

    expected = {name: [] for name in report["class_names"]}
    for record in tf.data.TFRecordDataset(str(folder / "train-00000-of-00001.tfrecord.gz"), "GZIP").as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        value = {key: feature[key].bytes_list.value[0] for key in ("image", "label", "filename")}
        expected[value["label"].decode()].append((value["filename"].decode().rpartition("/")[2], value["image"]))
    expected = [pair for pairs in expected.values() for pair in pairs[:8]]
    assert [alt for alt, _ in page.pictures] == [file for file, _ in expected]
    for (_, thumbnail), (_, encoded) in zip(page.pictures, expected, strict=True):
        original = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32)
        assert np.abs(np.asarray(thumbnail, np.float32) - original).mean() < 12  # a JPEG of the same 72 pixels


def test_write_data_report_gives_the_same_file_each_time(prepared):
    folder, report = prepared

    assert _write(folder, report).source == _write(folder, report).source


def test_write_data_report_loads_nothing_and_runs_nothing(prepared):
    page = _write(*prepared)

    assert [target for target in page.loaded if not target.startswith(("#", "data:image/jpeg;base64,"))] == []
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {target[1:] for target in page.loaded if target.startswith("#")} <= ids
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\(", page.source)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")


def test_write_data_report_says_what_to_look_at_and_when_numbers_do_not_add_up(tmp_path):
    page = _write(tmp_path, _make_report(_counts("cat", "dog"), warnings=["Few cats."], images=25))

    assert "1 thing to look at before you trust a model of this data Few cats." in page.text
    assert "The numbers do not add up. 3 images unaccounted for" in page.text
    assert "No warnings" not in page.text
    assert page.text.index("Few cats") < page.text.index("Classes and splits")


def test_write_data_report_shows_facts_columns_and_conversions(tmp_path):
    report = _make_report(
        _counts("cat", "dog"), column_counts={"camera": {"left": 12, "": 4}}, converted={"EXIF rotation applied": 3}
    )
    page = _write(tmp_path, report)

    assert "height, pixels 72 72 1,500" in page.text
    assert "width, pixels 72 80.5 72" in page.text
    assert "brightness, from 0 (black) to 1 (white) 0.10 0.46 0.90" in page.text
    assert "size of the record 999 bytes 12.3 kB 12.3 MB" in page.text
    assert "left 12 54.5 % (empty) 4 18.2 % rarer values 6 27.3 %" in page.text
    assert "EXIF rotation applied 3" in page.text


@pytest.mark.parametrize("scheme", ["", "gs://"])
def test_write_data_report_of_nothing(tmp_path, scheme):
    report = _make_report({split: {} for split in SPLITS}, facts={}, input=f"{scheme}photos/")

    assert "0 images in = 0 records" in _write(tmp_path, report).text


def test_write_data_report_shows_the_quarantine(tmp_path, encode):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.webp").write_bytes(encode(np.full((50, 100, 3), 200, np.uint8), "WEBP"))
    (photos / "b.jpg").write_text("no image")
    rows = [
        {"file": str(photos / "a.webp"), "label": "cat", "reason": "unknown format", "line": 3},
        {"file": str(photos / "b.jpg"), "label": "cat", "reason": "unknown format", "line": None},
        {"file": str(photos / "c.jpg"), "label": "dog", "reason": "there is no such file", "line": 5},
        {"file": str(photos), "label": "dog", "reason": "it is a folder", "line": 6},
        {"file": f"{photos}/a.tfrecord#17", "label": "dog", "reason": "it is empty", "line": None},
    ]
    page = _write(tmp_path, _make_report(_counts("cat", "dog"), quarantined=5, input=str(photos)), rows)

    assert "5 images could not be used and are in no split." in page.text
    assert "unknown format 2" in page.text
    assert "a.webp cat unknown format 3 b.jpg cat unknown format c.jpg dog there is no such file 5" in page.text
    [(alt, thumbnail)] = page.pictures
    assert alt == "a.webp"
    assert thumbnail.size == (100, 50)
    assert ("img", "192", "96") in [(tag, a.get("width"), a.get("height")) for tag, a in page.tags]


def test_write_data_report_shortens_long_lists_and_says_so(tmp_path):
    rows = [{"file": f"/p/{i}.jpg", "label": "cat", "reason": f"reason {i}", "line": i} for i in range(250)]
    duplicates = [{"file": f"/p/d{i}.jpg", "label": "cat", "same_as": "/p/1.jpg"} for i in range(150)]
    members = [{"file": f"/p/n{i}.jpg", "label": "cat", "moved_from": None} for i in range(9)]
    groups = [{"split": "train", "files": members}] * 25
    report = _make_report(_counts("cat", "dog"), quarantined=250, duplicates=duplicates, near_duplicates=groups)
    page = _write(tmp_path, report, rows)

    assert "250 images could not be used" in page.text
    assert "230 other reasons 230" in page.text
    assert "The first 200, file by file" in page.text
    assert "The other 50 are in quarantine.json." in page.text
    assert "150 files with the same content as another, left out. Shown are the first 100" in page.text
    assert page.text.count("9 images in train") == 20
    assert page.text.count("and 3 more.") == 20


def test_write_data_report_shows_what_looks_alike_and_what_was_moved(tmp_path, encode):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encode(np.full((40, 40, 3), 90, np.uint8)))
    cats = [{"file": f"/p/{name}.png", "label": "cat", "moved_from": None} for name in "xy"]
    differ = [
        {"file": str(tmp_path / "a.png"), "label": "cat", "moved_from": "test"},
        {"file": str(tmp_path / "b.png"), "label": "dog", "moved_from": None},
    ]
    groups = [{"split": "valid", "files": cats}, {"split": "train", "files": differ}]
    page = _write(tmp_path, _make_report(_counts("cat", "dog"), near_duplicates=groups))

    assert "2 groups of images that look alike" in page.text
    assert "1 image was moved for that. In 1 group the classes differ" in page.text
    assert page.text.index("2 images in train, 1 moved: classes differ") < page.text.index("2 images in valid")
    assert re.search(r"cat, moved from test\S*/a\.png dog\S*/b\.png", page.text)
    assert [alt for alt, _ in page.pictures] == ["a.png", "b.png"]


def test_write_data_report_turns_a_file_as_its_exif_data_say_and_a_record_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    Image.new("RGB", (90, 45)).save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    _write_shard(tmp_path / "train-00000-of-00001.tfrecord.gz", [(buffer.getvalue(), "cat", "a.jpg")])
    rows = [{"file": str(tmp_path / "a.jpg"), "label": "cat", "reason": "for the test", "line": None}]
    shards = {"train-00000-of-00001.tfrecord.gz": "00"}
    page = _write(tmp_path, _make_report(_counts("cat", "dog", train=1), shards=shards, quarantined=1), rows)

    assert [thumbnail.size for _, thumbnail in page.pictures] == [(90, 45), (45, 90)]


HOSTILE = (
    "<script>alert(1)</script>",
    "a & b",
    "\"quoted\" 'twice'",
    "new\nline",
    "猫と犬",
    "caf\udce9",
    "\ud800lone",
    "left\u202eright",
    "nul\x00",
    "{{ 1 }} %s {0}",
    "n" * 5000,
)


@pytest.mark.parametrize("name", HOSTILE)
def test_write_data_report_with_hostile_names(tmp_path, encode, name):
    is_encodable = not re.search("[\ud800-\udfff]", name)
    label = name if is_encodable else "cat"
    _write_shard(
        tmp_path / "train-00000-of-00001.tfrecord.gz",
        [(encode(np.zeros((8, 8, 3), np.uint8)), label, "photo.png" if "\ud800" in name else f"{name}.png")],
    )
    file = f"/photos/{name}.png"
    report = _make_report(
        _counts(label, "dog", train=1),
        input=name,
        warnings=[name],
        duplicates=[{"file": file, "label": label, "same_as": file}],
        near_duplicates=[{"split": "train", "files": [{"file": file, "label": name, "moved_from": "test"}] * 2}],
        column_counts={name: {name: 3}},
        converted={name: 1},
        shards={"train-00000-of-00001.tfrecord.gz": "00"},
        quarantined=1,
    )
    page = _write(tmp_path, report, [{"file": file, "label": name, "reason": name, "line": 1}])

    assert "script" not in {tag for tag, _ in page.tags}
    assert len(page.pictures) == 1
    assert page.loaded == [target for target in page.loaded if target.startswith(("#", "data:image/jpeg"))]
    assert not re.search("[\x00\u202e\ud800-\udfff]", page.source)
    shown = {
        "new\nline": r"new\nline",
        "caf\udce9": r"caf\udce9",
        "\ud800lone": r"\ud800lone",
        "left\u202eright": r"left\u202eright",
        "nul\x00": r"nul\x00",
        "n" * 5000: "n" * 200 + "…" + "n" * 200,
    }.get(name, name)
    assert page.text.count(shown) >= 8


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"no image",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\xff\xd8\xff\xe0" + bytes(100),
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_write_data_report_survives_a_file_that_is_no_image(tmp_path, encoded):
    (tmp_path / "a.jpg").write_bytes(encoded)
    rows = [{"file": str(tmp_path / "a.jpg"), "label": "cat", "reason": "bad", "line": None}]

    assert _write(tmp_path, _make_report(_counts("cat", "dog"), quarantined=1), rows).pictures == []


def test_write_data_report_does_not_decode_what_is_huge(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")  # 81 million pixels in 10 kB
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bigger.png")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(10**12)  # sparse: reading it would end the test
    rows = [
        {"file": str(tmp_path / name), "label": "cat", "reason": "huge", "line": None}
        for name in ("bomb.png", "bigger.png", "large.png")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = _write(tmp_path, _make_report(_counts("cat", "dog"), quarantined=3), rows)

    assert page.pictures == []


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("I;16", 25700, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_write_data_report_shows_every_kind_of_image(tmp_path, encode, mode, colour, expected):
    image = Image.new(mode, (100, 300), colour)
    _write_shard(tmp_path / "train-00000-of-00001.tfrecord.gz", [(encode(image), "cat", "a.png")])
    page = _write(tmp_path, _make_report(_counts("cat", "dog"), shards={"train-00000-of-00001.tfrecord.gz": "00"}))

    [(_, thumbnail)] = page.pictures
    assert thumbnail.size == (32, 96)
    np.testing.assert_allclose(np.asarray(thumbnail)[48, 16], expected, atol=3)


def test_write_data_report_of_a_thousand_classes_stays_usable(tmp_path, encode):
    names = [f"class {i}" for i in range(1000)]
    counts = _counts(*names, train=30)
    counts["train"]["class 700"] = 3
    counts["valid"]["class 700"] = 0
    noise = np.random.default_rng(0).integers(0, 256, (96, 300, 3), dtype=np.uint8)  # nothing compresses worse
    picture = encode(noise, "JPEG", quality=95)
    shard = "train-00000-of-00001.tfrecord.gz"
    _write_shard(tmp_path / shard, [(picture, name, f"{'n' * 200}.jpg") for name in names[:31] for _ in range(9)])
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture)
    rows = [{"file": str(tmp_path / "a.jpg"), "label": name, "reason": "r" * 300, "line": 1} for name in names]
    group = {"split": "test", "files": [{"file": str(tmp_path / "b.jpg"), "label": "class 1", "moved_from": None}] * 50}
    report = _make_report(
        counts,
        shards={shard: "00"},
        quarantined=1000,
        near_duplicates=[group] * 50,
        column_counts={f"column {i}": {f"{'v' * 60} {j}": 1 for j in range(20)} for i in range(60)},
    )
    page = _write(tmp_path, report, rows)

    assert (tmp_path / "report.html").stat().st_size < MAX_PAGE_BYTES
    assert len(page.pictures) == 30 * 8 + 24 + 20 * 6
    assert "From 5 to 33 images a class, 33 in the middle" in page.text
    assert "The 15 smallest classes class train valid test all share class 700 3 0 2 5 0.02 %" in page.text
    assert "Shown are the first 30 classes; 970 were left out." in page.text
    assert "class 30 8 of" not in page.text
    assert "20 more columns in report.json." in page.text
    [folded] = re.findall(r"<details><summary>All 1,000 classes.*?</details>", page.source, re.DOTALL)
    assert folded.count('<th scope="row">') == 1001


def test_write_data_report_names_the_classes_without_an_image_to_show(tmp_path, encode):
    shard = "train-00000-of-00001.tfrecord.gz"
    _write_shard(tmp_path / shard, [(encode(np.zeros((8, 8, 3), np.uint8)), "cat", "a.png")])
    page = _write(tmp_path, _make_report(_counts("cat", "dog", "eel"), shards={shard: "00"}))

    assert "cat 1 of 8 train images" in page.text
    assert "No image to show of dog, eel: there is none among the first 5,000 train records" in page.text


def test_write_data_report_takes_what_json_gives_back(tmp_path):
    report = _make_report(_counts("cat", "dog"), duplicates=[{"file": "caf\udce9", "label": "cat", "same_as": "b"}])

    assert "caf\\udce9" in _write(tmp_path, json.loads(json.dumps(report))).text
