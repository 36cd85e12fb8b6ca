import copy
import html.parser
import re
from pathlib import Path

import jinja2
import pytest

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
        "overall": {"accuracy": 0.75, "macro_f1": 0.744, "loss": 0.512, "example_count": 20.0},
        "classes": {
            "cat": {"precision": 0.667, "recall": 0.75, "f1": 0.706, "example_count": 8.0},
            "dog": {"precision": 0.818, "recall": 0.7512, "f1": 0.783, "example_count": 12.0},
        },
        "slices": {"label=cat": {"accuracy": 0.75, "loss": 0.4, "example_count": 8.0}},
        "confusion_matrix": [[6, 2], [3, 9]],
        "has_baseline": False,
    },
    "blessed": True,
    "reasons": [],
    "pushed_model": "/runs/photos/serving_model/17",
    "data_findings": [],
    "data_warnings": [],
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
        self._words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") and value:
                self.loaded.append(value)

    def handle_data(self, data):
        self._words.append(data)


def _report(tmp_path: Path, run: dict, history: dict = HISTORY) -> str:
    path = tmp_path / "report.html"
    write_report(path, run, history, Config())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_write_report_of_a_blessed_model_says_where_it_is(tmp_path):
    text = _Reader(_report(tmp_path, RUN)).text

    assert "photos: blessed" in text
    assert "Blessed and pushed." in text
    assert "/runs/photos/serving_model/17" in text
    assert "there was no earlier blessed model of these classes to compare it with" in text
    assert "Not blessed" not in text


def test_write_report_says_that_a_model_was_compared(tmp_path):
    run = RUN | {"metrics": RUN["metrics"] | {"has_baseline": True}}

    text = _Reader(_report(tmp_path, run)).text

    assert "is not worse than the latest blessed model" in text
    assert "the first of this pipeline" not in text


def test_write_report_of_a_refused_model_says_why(tmp_path):
    text = _Reader(_report(tmp_path, REFUSED)).text

    assert "photos: not blessed" in text
    assert "Not blessed, nothing was pushed." in text
    assert REFUSED["reasons"][0] in text
    assert "Blessed and pushed" not in text
    assert "serving_model" not in text


def test_write_report_shows_the_numbers(tmp_path):
    text = _Reader(_report(tmp_path, RUN)).text

    assert "Accuracy 75.0 % , macro F1 0.744 , log loss 0.512, 20 images." in text
    assert "dog 12 75.1 % 81.8 % 0.783" in text
    assert "label=cat 8 75.0 % 0.400" in text
    assert "train 811 79" in text
    assert "3 in quarantine, 2 exact duplicates left out." in text
    assert "Trainer done 8.0" in text
    assert "Pusher reused 0.1" in text
    assert '"min_accuracy"' in text
    assert re.search(r"tensorflow 2\.\d+", text)


def test_write_report_lists_what_the_data_gate_found(tmp_path):
    finding = "skew in `label`: 50.0% of train and 80.0% of test are '<b>'"

    for name in ("data_findings", "data_warnings"):
        assert finding in _Reader(_report(tmp_path, RUN | {name: [finding]})).text
    assert "data gate" not in _Reader(_report(tmp_path, RUN)).text.lower().replace('"data_gate"', "")


def test_write_report_draws_the_confusion_matrix_and_the_curves(tmp_path):
    page = _report(tmp_path, RUN)

    assert _Reader(page).tags.count("svg") == 2
    assert page.count('<figure role="img" aria-label="') == 2
    # Matplotlib names the text it draws as paths in comments.
    for text in ("cat", "dog", "predicted", "true", "6", "9", "loss", "accuracy", "epoch"):
        assert f"<!-- {text} -->" in page


def test_write_report_loads_nothing_from_anywhere(tmp_path):
    page = _report(tmp_path, RUN)
    reader = _Reader(page)

    assert [target for target in reader.loaded if not target.startswith(("#", "data:image/png;base64,"))] == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(reader.tags)
    assert not re.search(r"@import|url\((?!#)", page)
    # What is left are the names of XML vocabularies, and of who made the drawing.
    hosts = set(re.findall(r"https?://([\w.-]+)", page))
    assert hosts <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "--><b>", "a & b", "]]>", "{{ 7 * 7 }}"])
def test_write_report_shows_hostile_names_as_text(tmp_path, name):
    run = copy.deepcopy(REFUSED)
    run["metrics"]["classes"] = {name: RUN["metrics"]["classes"]["cat"], "dog": RUN["metrics"]["classes"]["dog"]}
    run["counts"] = {"train": {name: 811, "dog": 79}, "quarantined": 0, "duplicates": 0}
    run["metrics"]["slices"] = {f"label={name}": RUN["metrics"]["slices"]["label=cat"]}
    run["reasons"] = [f"accuracy of `label={name}` is low"]

    reader = _Reader(_report(tmp_path, run))

    assert "script" not in reader.tags
    assert reader.tags.count("b") == _Reader(_report(tmp_path, RUN)).tags.count("b")
    assert f"accuracy of `label={name}` is low" in reader.text


def test_write_report_leaves_numbers_out_of_many_cells(tmp_path):
    names = [f"class{number}" for number in range(16)]
    run = copy.deepcopy(RUN)
    run["metrics"]["classes"] = dict.fromkeys(names, RUN["metrics"]["classes"]["cat"])
    run["metrics"]["confusion_matrix"] = [[777 if row == column else 0 for column in range(16)] for row in range(16)]
    run["counts"] = {"train": dict.fromkeys(names, 1), "quarantined": 0, "duplicates": 0}

    page = _report(tmp_path, run)

    assert "<!-- class15 -->" in page
    assert "<!-- 777 -->" not in page


def test_write_report_takes_a_class_without_test_images(tmp_path):
    run = copy.deepcopy(RUN)
    run["metrics"]["confusion_matrix"] = [[0, 0], [3, 9]]

    assert "<!-- 9 -->" in _report(tmp_path, run)


def test_write_report_leaves_the_old_one_where_it_fails(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    incomplete = {name: value for name, value in RUN.items() if name != "blessed"}

    with pytest.raises(jinja2.UndefinedError, match="blessed"):
        write_report(path, incomplete, HISTORY, Config())

    assert path.read_text() == "old"
