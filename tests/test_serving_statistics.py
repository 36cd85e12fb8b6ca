import json

import numpy as np
import pyarrow
import pytest
import tensorflow_data_validation as tfdv
from google.protobuf import text_format
from PIL import Image, ImageEnhance
from serving_stand_in import save_classifier
from tensorflow_data_validation.statistics import stats_impl

from data.errors import EXIT_DATA_GATE, EXIT_DONE, EXIT_WRONG_INPUT
from data.features import FACT_KEYS, LABEL_KEY, make_schema
from pipeline.batch import predict_batch
from pipeline.drift import NUM_QUANTILES, num_examples
from pipeline.predict import main
from pipeline.serving_statistics import find_training_statistics, read_statistics

pytestmark = pytest.mark.one_stack

NUM_IMAGES = 150


def _noise(folder, seed: int, *, brightness: float = 1.0, num_images: int = NUM_IMAGES, size: int = 32):
    """A folder of noise about a grey value that is drawn anew for each image."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for number in range(num_images):
        pixels = np.clip(random.normal(random.uniform(60, 200), 20, (size, size, 3)), 0, 255).astype(np.uint8)
        ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(brightness).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model; a workspace whose training statistics StatisticsGen's own library made; and what three batches were."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_classifier(folder / "model" / "1")

    def predict(name: str, **noise):
        images = _noise(folder / f"{name}-images", **noise)
        predict_batch(
            str(images), str(folder / f"{name}.jsonl"), model=str(model), statistics_output=str(folder / f"{name}.pb")
        )
        return folder / f"{name}.pb"

    files = {
        "training": predict("training", seed=0),
        "fresh": predict("fresh", seed=1),
        "dark": predict("dark", seed=2, brightness=0.4),
    }
    split = folder / "workspace" / "pipeline" / "StatisticsGen" / "statistics" / "12" / "Split-train"
    split.mkdir(parents=True)
    (split / "FeatureStats.pb").write_bytes(files["training"].read_bytes())
    return folder, files


def _drift(runs, name: str, *options: str) -> int:
    folder, files = runs
    return main(["drift", "--statistics", str(folder / "workspace"), "--serving", str(files[name]), *options])


def test_drift_finds_nothing_in_a_fresh_sample(runs, capsys):
    assert _drift(runs, "fresh") == EXIT_DONE
    assert capsys.readouterr().out.splitlines() == [
        "150 images in use against 150 of training",
        "Nothing has moved by more than its limit.",
    ]


def test_drift_finds_darkened_images_and_their_labels(runs, capsys):
    assert _drift(runs, "dark", "--json") == EXIT_DATA_GATE

    report = json.loads(capsys.readouterr().out)
    assert sorted(finding.split("`")[1] if "`" in finding else "label" for finding in report["drift"]) == [
        "brightness",
        "label",
    ] or (
        any("`brightness`" in finding for finding in report["drift"])
        and any("the predicted label" in finding for finding in report["drift"])
        and len(report["drift"]) == 2
    )


def test_drift_takes_the_limits_of_a_schema(runs, tmp_path, capsys):
    schema = make_schema(["dark", "green", "bright"], ())
    for feature in schema.feature:
        if feature.HasField("drift_comparator"):
            feature.drift_comparator.infinity_norm.threshold = 1.0
    (tmp_path / "schema.pbtxt").write_text(text_format.MessageToString(schema))

    assert _drift(runs, "dark", "--schema", str(tmp_path / "schema.pbtxt")) == EXIT_DONE


def test_drift_says_that_few_images_say_little(runs, tmp_path, capsys):
    folder, _ = runs
    images = _noise(tmp_path / "few", seed=3, num_images=5)
    predict_batch(
        str(images), str(tmp_path / "few.jsonl"), model=str(folder / "model"), statistics_output=str(tmp_path / "few.pb")
    )

    main(["drift", "--statistics", str(folder / "workspace"), "--serving", str(tmp_path / "few.pb")])

    assert "note: 5 images are few" in capsys.readouterr().out


def test_write_statistics_gives_what_tfdv_gives_of_the_same_facts(runs):
    folder, files = runs
    pixels = [np.asarray(Image.open(path).convert("L"), np.float64) for path in sorted((folder / "training-images").iterdir())]
    labels = [json.loads(line)["label"] for line in (folder / "training.jsonl").read_text().splitlines()]
    batch = pyarrow.RecordBatch.from_pydict(
        {
            "brightness": [[float(image.mean() / 255)] for image in pixels],
            "height": [[image.shape[0]] for image in pixels],
            LABEL_KEY: [[label.encode()] for label in labels],
        }
    )
    options = tfdv.StatsOptions(num_quantiles_histogram_buckets=NUM_QUANTILES)
    expected = stats_impl.generate_statistics_in_memory(batch, options)

    found = read_statistics(str(files["training"]))

    assert num_examples(found) == NUM_IMAGES
    features, others = ({feature.path.step[0]: feature for feature in side.datasets[0].features} for side in (found, expected))
    assert set(features) == {LABEL_KEY, *FACT_KEYS}
    assert features["height"].num_stats.mean == others["height"].num_stats.mean == 32
    assert features["brightness"].num_stats.mean == pytest.approx(others["brightness"].num_stats.mean, abs=0.01)
    assert features["brightness"].num_stats.std_dev == pytest.approx(others["brightness"].num_stats.std_dev, abs=0.01)
    assert {bucket.label: bucket.sample_count for bucket in features[LABEL_KEY].string_stats.rank_histogram.buckets} == {
        bucket.label: bucket.sample_count for bucket in others[LABEL_KEY].string_stats.rank_histogram.buckets
    }


def test_write_statistics_leaves_bad_images_out(runs, tmp_path):
    folder, _ = runs
    images = _noise(tmp_path / "images", seed=4, num_images=3)
    (images / "bad.png").write_text("no image")

    predict_batch(
        str(images), str(tmp_path / "out.jsonl"), model=str(folder / "model"), statistics_output=str(tmp_path / "out.pb")
    )

    assert num_examples(read_statistics(str(tmp_path / "out.pb"))) == 3


@pytest.mark.parametrize("below", ["", "12", "12/Split-train", "12/Split-train/FeatureStats.pb"])
def test_find_training_statistics_takes_what_is_at_hand(runs, below):
    folder, _ = runs
    root = folder / "workspace"
    given = root / "pipeline" / "StatisticsGen" / "statistics" / below if below else root

    assert find_training_statistics(str(given)) == str(
        root / "pipeline" / "StatisticsGen" / "statistics" / "12" / "Split-train" / "FeatureStats.pb"
    )


def test_find_training_statistics_takes_the_newest_of_a_workspace(tmp_path):
    for number in ("9", "10"):
        folder = tmp_path / "pipeline" / "StatisticsGen" / "statistics" / number / "Split-train"
        folder.mkdir(parents=True)
        (folder / "FeatureStats.pb").touch()

    assert "/10/" in find_training_statistics(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--statistics", None, "Expected --statistics to be a statistics file, its folder, or a run's workspace"),
        ("--serving", b"no statistics", "Expected a statistics file"),
        ("--serving", b"", "Expected statistics of one example at least"),
        ("--schema", b"no schema", "Expected a schema in text form"),
    ],
)
def test_drift_says_what_is_wrong_in_one_line(runs, tmp_path, capsys, option, content, message):
    folder, files = runs
    path = tmp_path / "wrong"
    if content is not None:
        path.write_bytes(content)
    given = {"--statistics": str(folder / "workspace"), "--serving": str(files["fresh"])} | {option: str(path)}

    assert main(["drift", *(text for pair in given.items() for text in pair)]) == EXIT_WRONG_INPUT

    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
