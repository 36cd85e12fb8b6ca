import base64
import copy
import html
import html.parser
import io
import math
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.config import Config
from pipeline.report import write_report

HISTORY = {"loss": [0.7, 0.5], "accuracy": [0.5, 0.8], "val_loss": [0.6, 0.55], "val_accuracy": [0.6, 0.7]}
RUN = {
    "pipeline": "photos",
    "exit_code": 0,
    "seconds": 12.3,
    "counts": {
        "train": {"cat": 811, "dog": 79},
        "valid": {"cat": 10, "dog": 9},
        "test": {"cat": 8, "dog": 12},
        "quarantined": 3,
        "duplicates": 2,
    },
    "components": [
        {"name": "Trainer", "state": "done", "seconds": 8.0, "cached": False},
        {"name": "Pusher", "state": "done", "seconds": 0.1, "cached": True},
    ],
    "metrics": {
        "overall": {
            "accuracy": 0.75,
            "macro_f1": 0.744,
            "log_loss": 0.512,
            "expected_calibration_error": 0.04,
            "example_count": 20.0,
        },
        "classes": {
            "cat": {"precision": 0.667, "recall": 0.75, "f1": 0.706, "roc_auc": 0.9, "pr_auc": 0.8, "example_count": 8.0},
            "dog": {"precision": 0.818, "recall": 0.7512, "f1": 0.783, "roc_auc": 0.9, "pr_auc": 0.8, "example_count": 12.0},
        },
        "slices": {
            "label=cat": {
                "accuracy": 0.75,
                "macro_f1": 0.7,
                "log_loss": 0.4,
                "expected_calibration_error": 0.1,
                "example_count": 8.0,
            }
        },
        "intervals": {
            "overall": {"accuracy": [0.612, 0.871]},
            "classes": {"dog": {"recall": [0.55, 0.9]}},
            "slices": {"label=cat": {"accuracy": [0.4, 0.9]}},
        },
        "confusion_matrix": [[6, 2], [3, 9]],
        "calibration": [{"confidence": 0.62, "accuracy": 0.5, "count": 8}, {"confidence": 0.9, "accuracy": 0.91, "count": 12}],
        "mistakes": [
            {"filename": "1.png", "label": "cat", "predicted": "dog", "probability": 0.93},
            {"filename": "nowhere.png", "label": "dog", "predicted": "cat", "probability": 0.81},
        ],
        "has_baseline": False,
        "baseline": None,
    },
    "serving_check": {
        "blessed": True,
        "reasons": [],
        "model_digest": "ab12",
        "num_images": 64,
        "max_difference": 1.2e-6,
        "load_seconds": 2.31,
        "latency_ms": {"1": {"p50": 21.4, "p99": 33.8, "calls": 100}, "32": None},
        "memory_mb": None,
        "images_per_second": 79.6,
        "hostile": [{"name": "truncated JPEG", "outcome": "refused"}],
    },
    "fingerprints": {"code": "9fc0de", "records": "3cda7a"},
    "blessed": True,
    "reasons": [],
    "pushed_model": "/runs/photos/serving_model/17",
    "data_findings": [],
    "data_warnings": [],
}
BASELINE = {
    "model": "/runs/photos/pipeline/Trainer/model/8",
    "problem": "",
    "overall": {"accuracy": 0.7, "macro_f1": 0.8, "log_loss": 0.6, "expected_calibration_error": 0.05},
    "classes": {"cat": {"recall": 0.5, "f1": 0.6}, "dog": {"recall": 0.8, "f1": 0.8}},
    "changes": {
        "accuracy": {"change": 0.05, "interval": [-0.02, 0.12]},
        "macro_f1": {"change": -0.056, "interval": [-0.1, -0.01]},
        "log_loss": {"change": -0.088, "interval": [-0.15, -0.02]},
        "expected_calibration_error": {"change": math.nan, "interval": [math.nan, math.nan]},
    },
}
REFUSED = RUN | {
    "exit_code": 3,
    "blessed": False,
    "reasons": ["accuracy over all test images is 0.750 with 20 examples; the limit is 0.800"],
    "pushed_model": None,
}


class _Reader(html.parser.HTMLParser):
    """Collects the visible text, and every attribute by which a page loads something."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self._words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") and value:
                self.loaded.append(value)

    @property
    def drawings(self) -> list[str]:
        """The SVGs."""
        prefix = "data:image/svg+xml;base64,"
        uris = [image["src"] for image in self.images if image["src"].startswith(prefix)]
        return [base64.b64decode(uri.removeprefix(prefix)).decode() for uri in uris]

    @property
    def photos(self) -> dict[str, Image.Image]:
        """The JPEGs, by their text alternatives."""
        prefix = "data:image/jpeg;base64,"
        photos = [image for image in self.images if image["src"].startswith(prefix)]
        return {image["alt"]: Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix(prefix)))) for image in photos}

    def handle_data(self, data):
        self._words.append(data)


def _report(tmp_path: Path, run: dict, history: dict = HISTORY, **options) -> str:
    path = tmp_path / "report" / "report.html"
    path.parent.mkdir(exist_ok=True)
    write_report(path, run, history, Config(), **options)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_write_report_of_a_blessed_model_says_where_it_is(tmp_path):
    text = _Reader(_report(tmp_path, RUN)).text

    assert "photos: blessed" in text
    assert "Blessed and pushed." in text
    assert "/runs/photos/serving_model/17" in text
    assert "it was compared with no earlier model" in text
    assert "Not blessed" not in text


def test_write_report_says_what_changed_and_what_is_noise(tmp_path):
    run = RUN | {"metrics": RUN["metrics"] | {"has_baseline": True, "baseline": BASELINE}}

    text = _Reader(_report(tmp_path, run)).text

    assert "is not worse than the latest blessed model" in text
    assert "there was no earlier blessed model" not in text
    assert "accuracy 0.750 0.700 +0.050 −0.020 to +0.120 within the noise" in text
    assert "macro F1 0.744 0.800 −0.056 −0.100 to −0.010 worse" in text
    assert "log loss 0.512 0.600 −0.088 −0.150 to −0.020 better" in text
    assert "expected calibration error 0.040 0.050 not a number" in text
    assert "cat 0.750 0.500 +0.250 0.706 0.600 +0.106" in text
    assert BASELINE["model"] in text


def test_write_report_says_why_a_baseline_could_not_be_evaluated(tmp_path):
    problem = "It knows the classes `a` and `b`. Give the pipeline of other classes another name."
    baseline = BASELINE | {"problem": problem, "overall": {}, "classes": {}, "changes": {}}
    run = RUN | {"metrics": RUN["metrics"] | {"has_baseline": True, "baseline": baseline}}

    text = _Reader(_report(tmp_path, run)).text

    assert f"It could not be evaluated. {problem}" in text
    assert "it could not be compared with the latest blessed model" in text
    assert "is not worse than the latest blessed model" not in text


def test_write_report_of_a_refused_model_says_why(tmp_path):
    text = _Reader(_report(tmp_path, REFUSED)).text

    assert "photos: not blessed" in text
    assert "Not blessed, nothing was pushed." in text
    assert REFUSED["reasons"][0] in text
    assert "Blessed and pushed" not in text
    assert "serving_model" not in text


def test_write_report_shows_the_numbers_with_their_intervals(tmp_path):
    text = _Reader(_report(tmp_path, RUN)).text

    assert "accuracy 0.750 0.612 to 0.871 macro F1 0.744 log loss 0.512" in text
    assert "dog 12 0.818 0.751 0.550 to 0.900 0.783 0.900 0.800" in text
    assert "label=cat 8 0.750 0.400 to 0.900 0.700 0.400 0.100" in text
    assert "cat 811 10 8 829" in text
    assert "3 in quarantine, 2 exact duplicates left out." in text
    assert "Trainer done 8.0" in text
    assert "Pusher reused 0.1" in text
    assert "9fc0de" in text
    assert '"min_accuracy"' in text
    assert re.search(r"tensorflow 2\.\d+", text)


def test_write_report_shows_the_serving_check(tmp_path):
    text = _Reader(_report(tmp_path, RUN)).text
    failed = RUN | {"serving_check": RUN["serving_check"] | {"blessed": False, "reasons": ["p99 is 33.8 ms; the limit is 30"]}}

    assert "Passed : the exported model" in text
    assert "time to load 2.3 s memory not measured images a second 79.6 images compared 64" in text
    assert "largest difference from training 1.2e-06" in text
    assert "1 21.4 33.8 100 32 not measured" in text
    assert "truncated JPEG refused" in text
    assert "Failed : the exported model" in _Reader(_report(tmp_path, failed)).text
    assert "p99 is 33.8 ms; the limit is 30" in _Reader(_report(tmp_path, failed)).text
    assert "There was none in this run." in _Reader(_report(tmp_path, RUN | {"serving_check": None})).text


def test_write_report_says_what_is_not_a_number(tmp_path):
    run = copy.deepcopy(REFUSED)
    run["metrics"]["overall"]["log_loss"] = math.nan
    run["metrics"]["slices"]["label=cat"]["accuracy"] = math.nan

    text = _Reader(_report(tmp_path, run)).text

    assert "log loss not a number" in text
    assert "label=cat 8 not a number" in text


def test_write_report_of_a_run_without_extras(tmp_path):
    run = copy.deepcopy(RUN)
    for name in ("serving_check", "fingerprints"):
        del run[name]
    for name in ("intervals", "calibration", "mistakes", "baseline"):
        del run["metrics"][name]

    text = _Reader(_report(tmp_path, run, {})).text

    assert "5 test images were classified wrongly; which ones was not recorded." in text
    assert "There are no curves of the training." in text


def test_write_report_lists_what_the_data_gate_found(tmp_path):
    finding = "skew in `label`: 50.0% of train and 80.0% of test are '<b>'"

    for name in ("data_findings", "data_warnings"):
        assert finding in _Reader(_report(tmp_path, RUN | {name: [finding]})).text
    assert "data gate" not in _Reader(_report(tmp_path, RUN)).text.lower().replace('"data_gate"', "")


def test_write_report_draws_the_curves_the_confusion_matrix_and_the_calibration(tmp_path):
    reader = _Reader(_report(tmp_path, RUN))

    curves, confusion, calibration = reader.drawings
    for drawing, words in (
        (curves, ("loss", "accuracy", "epoch", "train", "valid")),
        (confusion, ("cat", "dog", "predicted", "true", "6", "9")),
        (calibration, ("share that is right", "probability of the predicted class", "images")),
    ):
        for word in words:
            assert f">{word}</text>" in drawing, word
    alts = [image["alt"] for image in reader.images[-3:]]
    assert "lowest validation loss 0.550 after epoch 2" in alts[0]
    assert "15 of 20 test images are on the diagonal" in alts[1]
    assert "of the 8 images with a probability of about 0.62, 0.50 are right, less than the model says" in alts[2]
    assert "dog cat 3 25.0 % cat dog 2 25.0 %" in reader.text


def test_write_report_loads_nothing_from_anywhere(tmp_path):
    page = _report(tmp_path, RUN)
    reader = _Reader(page)

    ids = {attributes["id"] for _, attributes in reader.attributes if "id" in attributes}
    assert {target[1:] for target in reader.loaded if target.startswith("#")} <= ids
    assert [target for target in reader.loaded if not target.startswith(("#", "data:"))] == []
    assert not {"script", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "default-src 'none'" in page


def test_write_report_can_be_read_without_eyes_and_without_a_mouse(tmp_path):
    run = RUN | {"metrics": RUN["metrics"] | {"has_baseline": True, "baseline": BASELINE}}
    reader = _Reader(_report(tmp_path, run))

    assert reader.tags.count("h1") == 1
    assert all(image.get("alt") for image in reader.images)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in reader.attributes if tag == "th")
    assert reader.tags.count("caption") == reader.tags.count("table") > 5
    regions = [attributes for _, attributes in reader.attributes if attributes.get("class") == "scroll"]
    assert len(regions) >= reader.tags.count("table")
    assert all((region["tabindex"], region["role"]) == ("0", "region") and region["aria-label"] for region in regions)


def _luminance(color: str) -> float:
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    channels = [int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_write_report_has_colours_of_enough_contrast(tmp_path):
    page = _report(tmp_path, RUN)
    colors = dict(re.findall(r"--(\w+): #([0-9a-f]{3}(?:[0-9a-f]{3})?)", page))

    for ground in ("paper", "soft"):
        for ink in ("ink", "muted", "good", "bad", "look", "link"):
            ratio = (_luminance(colors[ground]) + 0.05) / (_luminance(colors[ink]) + 0.05)
            assert ratio >= 4.5, (ink, ground, ratio)


def _write_records(tmp_path: Path, write_records) -> str:
    folder = tmp_path / "records [1]"
    folder.mkdir()
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(4)]
    write_records(folder / "train-00000-of-00001.tfrecord.gz", noise, ["cat", "dog", "cat", "dog"])
    write_records(folder / "test-00000-of-00001.tfrecord.gz", noise[:2], ["dog", "cat"])
    return str(folder)


class _Bright(tf.Module):
    """A model of known gradients: the probability of `dog` grows with the upper half of the image."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def explain_preprocess(self, image_bytes):
        def decode(encoded):
            return tf.image.resize(tf.io.decode_png(encoded, channels=3), (32, 32))

        return {"images": tf.map_fn(decode, image_bytes, fn_output_signature=tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32)])
    def explain_model(self, images):
        dog = tf.sigmoid(tf.reduce_mean(images[:, :16], axis=(1, 2, 3)) / 255)
        return {"probabilities": tf.stack([1 - dog, dog], axis=1)}


def test_write_report_shows_the_classes_and_the_mistakes_with_heat_maps(tmp_path, write_records):
    module = _Bright()
    signatures = {name: getattr(module, name).get_concrete_function() for name in ("explain_preprocess", "explain_model")}
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=signatures)
    records = _write_records(tmp_path, write_records)

    reader = _Reader(_report(tmp_path, RUN, records=records, model=str(tmp_path / "model")))

    assert set(reader.photos) == {
        "cat, image 1",
        "cat, image 2",
        "dog, image 1",
        "dog, image 2",
        "A cat that the model takes for dog",
        "Heat map of what speaks for dog in the picture beside it",
    }
    heat_map = np.asarray(reader.photos["Heat map of what speaks for dog in the picture beside it"]).astype(int)
    assert heat_map.shape == (40, 60, 3)
    colorfulness = np.ptp(heat_map, axis=-1).mean(axis=1)
    assert colorfulness[:16].mean() > 5 * colorfulness[26:].mean()  # the model looks at the upper half alone
    assert "2 of 5 test images that the model got wrong" in reader.text
    assert "true cat , predicted dog with 0.930 1.png" in reader.text
    assert "true dog , predicted cat with 0.810 nowhere.png" in reader.text


def test_write_report_without_a_usable_model_says_so_and_shows_the_pictures(tmp_path, write_records):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"no model")
    records = _write_records(tmp_path, write_records)

    reader = _Reader(_report(tmp_path, RUN, records=records, model=str(broken)))

    assert "No heat maps: the model cannot be explained (Expected a SavedModel with the signatures" in reader.text
    assert "A cat that the model takes for dog" in reader.photos
    assert "Beside each picture" not in reader.text


def test_write_report_of_lost_records_has_no_pictures(tmp_path):
    assert not _Reader(_report(tmp_path, RUN, records=str(tmp_path / "nowhere"))).photos
    (tmp_path / "test-00000-of-00001.tfrecord.gz").write_bytes(b"damaged")
    (tmp_path / "train-00000-of-00001.tfrecord.gz").write_bytes(b"damaged")
    assert not _Reader(_report(tmp_path, RUN, records=str(tmp_path))).photos


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "--><b>", "a & b", "]]>", "{{ 7 * 7 }}", "$x^2$", '"onload="alert(1)']
)
def test_write_report_shows_hostile_names_as_text(tmp_path, name):
    run = copy.deepcopy(REFUSED)
    run["metrics"]["classes"] = {name: RUN["metrics"]["classes"]["cat"], "dog": RUN["metrics"]["classes"]["dog"]}
    run["counts"] = {"train": {name: 811, "dog": 79}, "quarantined": 0, "duplicates": 0}
    run["metrics"]["slices"] = {f"label={name}": RUN["metrics"]["slices"]["label=cat"]}
    run["metrics"]["mistakes"] = [{"filename": name, "label": name, "predicted": "dog", "probability": 0.9}]
    run["serving_check"]["hostile"] = [{"name": name, "outcome": name}]
    run["reasons"] = [f"accuracy of `label={name}` is low"]

    reader = _Reader(_report(tmp_path, run))

    assert not {"script", "svg"} & set(reader.tags)
    assert not any(key.startswith("on") for _, attributes in reader.attributes for key in attributes)
    assert reader.tags.count("b") == _Reader(_report(tmp_path, RUN)).tags.count("b") - 1  # one mistake instead of two
    assert reader.text.count(name) >= 7
    drawn = [re.sub(r"\s*<!--.*?-->", "", drawing, flags=re.DOTALL) for drawing in reader.drawings]
    shown = html.unescape(drawn[1])
    assert name[:23] in shown


def test_write_report_shows_what_cannot_be_seen_or_encoded(tmp_path):
    run = copy.deepcopy(RUN)
    run["metrics"]["mistakes"][0]["filename"] = "photo\udcff\u202e.png"

    assert "photo\\udcff\\u202e.png" in _Reader(_report(tmp_path, run)).text


def test_write_report_leaves_numbers_out_of_many_cells(tmp_path):
    names = [f"class{number}" for number in range(16)]
    run = copy.deepcopy(RUN)
    run["metrics"]["classes"] = dict.fromkeys(names, RUN["metrics"]["classes"]["cat"])
    run["metrics"]["confusion_matrix"] = [[777 if row == column else 0 for column in range(16)] for row in range(16)]
    run["counts"] = {"train": dict.fromkeys(names, 1), "quarantined": 0, "duplicates": 0}

    drawing = _Reader(_report(tmp_path, run)).drawings[1]

    assert ">class15</text>" in drawing
    assert ">777</text>" not in drawing


def test_write_report_folds_many_classes_and_stays_small(tmp_path):
    names = [f"class {number:03d}" for number in range(300)]
    run = copy.deepcopy(RUN)
    one = RUN["metrics"]["classes"]["cat"]
    run["metrics"]["classes"] = {name: one | {"f1": number / 300} for number, name in enumerate(names)}
    run["metrics"]["intervals"]["classes"] = {name: {"f1": [0.1, 0.2]} for name in names}
    run["metrics"]["slices"] = {f"label={name}": RUN["metrics"]["slices"]["label=cat"] for name in (*names, *range(900))}
    run["metrics"]["confusion_matrix"] = np.eye(300, dtype=int).tolist()
    run["counts"] = {"train": dict.fromkeys(names, 1), "quarantined": 0, "duplicates": 0}

    page = _report(tmp_path, run)

    text = _Reader(page).text
    assert len(page) < 1_500_000
    assert text.index("The 10 classes with the lowest F1") < text.index("class 009 8") < text.index("All 300 classes")
    assert "The first 1,000 slices The other 200 are in run.json." in text
    assert "Images of all 300 classes" in text


def test_write_report_takes_a_class_without_test_images(tmp_path):
    run = copy.deepcopy(RUN)
    run["metrics"]["confusion_matrix"] = [[0, 0], [3, 9]]

    assert ">9</text>" in _Reader(_report(tmp_path, run)).drawings[1]


def test_write_report_leaves_the_old_one_where_it_fails(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    incomplete = {name: value for name, value in RUN.items() if name != "blessed"}

    with pytest.raises(jinja2.UndefinedError, match="blessed"):
        write_report(path, incomplete, HISTORY, Config())

    assert path.read_text() == "old"
