from pathlib import Path

import ml_metadata as mlmd
import pyarrow
import pytest
import tensorflow_data_validation as tfdv
from ml_metadata.proto import metadata_store_pb2
from tensorflow_data_validation.statistics import stats_impl
from tfx.components.example_validator.executor import Executor as ExampleValidatorExecutor
from tfx.types import artifact_utils, standard_artifacts

from data.errors import DataAnomalyError
from data.features import FACT_KEYS, LABEL_KEY, SPLITS, make_schema
from pipeline.components import DataGate, LatestBlessedStatisticsStrategy, LatestOtherBlessedModelStrategy
from pipeline.drift import NUM_QUANTILES

COLUMNS = ("camera",)


def _rows(count: int, *, circles: float = 0.5, height: int = 64, cameras: int = 2) -> dict[str, list]:
    """Records of one split, by column: a share of circles, an image height and cameras by turns."""
    return {
        "label": [b"circle" if number < circles * count else b"square" for number in range(count)],
        "camera": [b"camera %d" % (number % cameras) for number in range(count)],
        "height": [height] * count,
        "width": [64] * count,
        "aspect": [64 / height] * count,
        "brightness": [0.3 + 0.4 * number / count for number in range(count)],
        "channels": [3] * count,
    }


@pytest.fixture
def make_statistics(tmp_path: Path):
    """Gives `make_statistics(name, train=rows, ...)`: what StatisticsGen would write, of `_rows(400)` where not given."""

    def make(name: str, **splits: dict[str, list]) -> standard_artifacts.ExampleStatistics:
        artifact = standard_artifacts.ExampleStatistics()
        artifact.uri = str(tmp_path / name)
        artifact.split_names = artifact_utils.encode_split_names(list(SPLITS))
        options = tfdv.StatsOptions(
            feature_allowlist=[LABEL_KEY, *FACT_KEYS, *COLUMNS], num_quantiles_histogram_buckets=NUM_QUANTILES
        )
        for split in SPLITS:
            rows = splits.get(split) or _rows(400)
            batch = pyarrow.RecordBatch.from_pydict({key: [[value] for value in values] for key, values in rows.items()})
            path = Path(artifact_utils.get_split_uri([artifact], split))
            path.mkdir(parents=True)
            statistics = stats_impl.generate_statistics_in_memory(batch, options)
            (path / "FeatureStats.pb").write_bytes(statistics.SerializeToString())
        return artifact

    return make


@pytest.fixture
def run_gate(tmp_path: Path):
    """Gives `run_gate(statistics, baseline=None, **settings)`: runs ExampleValidator and the gate, returns what it puts out."""

    def run(statistics, baseline=None, *, edit_schema=lambda schema: None, **settings) -> list[str]:
        schema, anomalies = standard_artifacts.Schema(), standard_artifacts.ExampleAnomalies()
        schema.uri, anomalies.uri = str(tmp_path / "schema"), str(tmp_path / "anomalies")
        curated = make_schema(["circle", "square"], COLUMNS)
        edit_schema(curated)
        Path(schema.uri).mkdir(exist_ok=True)
        tfdv.write_schema_text(curated, str(Path(schema.uri, "schema.pbtxt")))
        ExampleValidatorExecutor().Do({"statistics": [statistics], "schema": [schema]}, {"anomalies": [anomalies]}, {})

        inputs = {"anomalies": [anomalies], "statistics": [statistics], "schema": [schema]}
        inputs["baseline_statistics"] = [baseline] if baseline else []
        findings = standard_artifacts.JsonValue()
        findings.uri = str(tmp_path / "findings")
        outputs = {"findings": [findings]}
        properties = {"action": "stop", "min_examples": 100, "code": ""} | settings
        DataGate.EXECUTOR_SPEC.executor_class().Do(inputs, outputs, properties)
        return outputs["findings"][0].value

    return run


def _stopped(run_gate, *arguments, **settings) -> list[str]:
    """Runs the gate, which has to stop, and returns its findings."""
    with pytest.raises(DataAnomalyError) as caught:
        run_gate(*arguments, **settings)
    assert str(caught.value) == "\n".join(caught.value.args)
    (hint,) = caught.value.__notes__
    assert 'set data_gate.action to "warn"' in hint
    return list(caught.value.args)


def test_data_gate_lets_good_data_through(make_statistics, run_gate):
    assert run_gate(make_statistics("now"), make_statistics("before")) == []


def test_data_gate_stops_at_anomalies_of_every_split(make_statistics, run_gate):
    hexagon = _rows(400)
    hexagon["label"] = [b"hexagon"] * 4 + hexagon["label"][4:]
    statistics = make_statistics("now", train=hexagon, test=_rows(400) | {"height": [0] * 400})

    found = _stopped(run_gate, statistics)

    assert found[0].startswith("anomaly in `label` of train: ")
    assert "hexagon" in found[0]
    assert found[1].startswith("anomaly in `height` of test: ")
    # Of another height than train's, too; labels differ by 1 % only.
    assert [sentence.split(":")[0] for sentence in found[2:]] == ["skew in `height`"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_data_gate_stops_at_skew_between_the_splits(make_statistics, run_gate, split):
    statistics = make_statistics("now", **{split: _rows(400, circles=0.8)})

    assert _stopped(run_gate, statistics) == [
        f"skew in `label`: 50.0% of train and 80.0% of {split} are 'circle'; the difference is 0.300, the limit 0.2"
    ]


def test_data_gate_stops_at_skew_in_a_column(make_statistics, run_gate):
    four = _rows(400, cameras=4)

    (sentence,) = _stopped(run_gate, make_statistics("now", train=four, valid=four, test=_rows(400, cameras=1)))

    assert sentence.startswith("skew in `camera`: 25.0% of train and 100.0% of test are 'camera 0'")


def test_data_gate_stops_at_drift_against_the_earlier_data(make_statistics, run_gate):
    larger = {split: _rows(400, height=128) for split in SPLITS}
    current, baseline = make_statistics("now", **larger), make_statistics("before")

    assert run_gate(current) == []
    assert _stopped(run_gate, current, baseline) == [
        "drift in `height`: 0.0% of train and 100.0% of the train split of the latest blessed model are at most 64; "
        "the difference is 1.000, the limit 0.3",
        "drift in `aspect`: 100.0% of train and 0.0% of the train split of the latest blessed model are at most 0.5; "
        "the difference is 1.000, the limit 0.3",
    ]


def test_data_gate_goes_by_the_comparators_that_the_user_edits(make_statistics, run_gate):
    statistics = make_statistics("now", test=_rows(400, circles=0.8))

    def allow(schema):
        next(item for item in schema.feature if item.name == "label").skew_comparator.infinity_norm.threshold = 0.4

    def remove(schema):
        next(item for item in schema.feature if item.name == "label").ClearField("skew_comparator")

    assert len(_stopped(run_gate, statistics)) == 1
    assert run_gate(statistics, edit_schema=allow) == run_gate(statistics, edit_schema=remove) == []


def test_data_gate_that_only_warns_puts_out_what_would_have_stopped(make_statistics, run_gate):
    statistics = make_statistics("now", train=_rows(400, circles=0.9), test=_rows(400) | {"height": [0] * 400})
    baseline = make_statistics("before")

    stopped = _stopped(run_gate, statistics, baseline)

    assert {sentence.split(" in ")[0] for sentence in stopped} == {"anomaly", "skew", "drift"}
    assert run_gate(statistics, baseline, action="warn") == stopped


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_data_gate_does_not_compare_few_examples_and_says_so(make_statistics, run_gate, action):
    statistics = make_statistics("now", valid=_rows(99, circles=1), test=_rows(100))
    baseline = make_statistics("before", train=_rows(99, height=128))

    assert run_gate(statistics, baseline, action=action) == [
        "skew: train (400 examples) was not compared with valid (99): both need 100 (data_gate.min_examples), as few examples "
        "differ by chance",
        "drift: train (400 examples) was not compared with the train split of the latest blessed model (99): both need 100 "
        "(data_gate.min_examples), as few examples differ by chance",
    ]
    found = _stopped(run_gate, statistics, baseline, min_examples=99)
    assert {sentence.split(":")[0] for sentence in found} == {"skew in `label`", "drift in `height`", "drift in `aspect`"}


def test_data_gate_says_nothing_of_comparisons_that_the_schema_does_not_ask_for(make_statistics, run_gate):
    def remove(schema):
        for feature in schema.feature:
            feature.ClearField("skew_comparator")
            feature.ClearField("drift_comparator")

    small = make_statistics("now", **{split: _rows(10) for split in SPLITS})
    assert run_gate(small, make_statistics("before"), edit_schema=remove) == []


class _Lineage:
    """A metadata store, with what a pipeline's runs would have left in it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.store = mlmd.MetadataStore(metadata_store_pb2.ConnectionConfig(fake_database={}))
        self._artifact_type = self.store.put_artifact_type(metadata_store_pb2.ArtifactType(name="Artifact"))
        self._execution_type = self.store.put_execution_type(metadata_store_pb2.ExecutionType(name="Execution"))
        self.all = {"baseline_statistics": [], "model": [], "model_blessing": [], "infra_blessing": []}

    def _put(self, artifact, *inputs: tuple[str, object]):
        (artifact.id,) = self.store.put_artifacts([metadata_store_pb2.Artifact(type_id=self._artifact_type)])
        artifact.uri = str(self._folder / str(artifact.id))
        Path(artifact.uri).mkdir()
        (execution,) = self.store.put_executions([metadata_store_pb2.Execution(type_id=self._execution_type)])
        event = metadata_store_pb2.Event
        events = [event(artifact_id=artifact.id, execution_id=execution, type=event.OUTPUT)]
        events[0].path.steps.add(key="output")
        for key, source in inputs:
            events.append(event(artifact_id=source.id, execution_id=execution, type=event.INPUT))
            events[-1].path.steps.add(key=key)
        self.store.put_events(events)
        return artifact

    def reuse(self, artifact) -> None:
        """Puts what a later run out of the cache leaves: an execution with the same output."""
        (execution,) = self.store.put_executions([metadata_store_pb2.Execution(type_id=self._execution_type)])
        event = metadata_store_pb2.Event(artifact_id=artifact.id, execution_id=execution, type=metadata_store_pb2.Event.OUTPUT)
        event.path.steps.add(key="output")
        self.store.put_events([event])

    def data(self) -> tuple[standard_artifacts.Examples, standard_artifacts.ExampleStatistics]:
        examples = self._put(standard_artifacts.Examples())
        return examples, self.statistics(examples)

    def statistics(self, examples) -> standard_artifacts.ExampleStatistics:
        statistics = self._put(standard_artifacts.ExampleStatistics(), ("examples", examples))
        self.all["baseline_statistics"].append(statistics)
        return statistics

    def model(
        self,
        examples,
        *,
        blessed: bool = True,
        servable: bool | None = True,
        class_names: tuple[str, ...] = ("circle", "square"),
        baseline: int | None = None,
    ) -> Path:
        """Puts a model with its blessings; `servable` is None where the serving check was never reached."""
        schema = self._put(standard_artifacts.Schema())
        model = self._put(standard_artifacts.Model(), ("examples", examples), ("schema", schema))
        labels = Path(model.uri, "Format-Serving", "assets.extra", "labels.txt")
        labels.parent.mkdir(parents=True)
        labels.write_text("\n".join(class_names))
        # The Evaluator has examples for its input as well, whatever they were.
        blessing = self._put(standard_artifacts.ModelBlessing(), ("model", model), ("examples", examples))
        blessing.set_int_custom_property("blessed", int(blessed))
        blessing.set_int_custom_property("current_model_id", model.id)
        if baseline is not None:
            blessing.set_int_custom_property("baseline_model_id", baseline)
        self.all["model"].append(model)
        self.all["model_blessing"].append(blessing)
        if servable is not None:
            infra_blessing = self._put(standard_artifacts.InfraBlessing(), ("model", model))
            infra_blessing.set_int_custom_property("blessed", int(servable))
            infra_blessing.set_int_custom_property("current_model_id", model.id)
            self.all["infra_blessing"].append(infra_blessing)
        return labels

    def baseline_of(self, candidate) -> list[int]:
        inputs = {name: artifacts for name, artifacts in self.all.items() if name != "baseline_statistics"}
        resolved = LatestOtherBlessedModelStrategy().resolve_artifacts(self.store, {"candidate": [candidate], **inputs})
        assert resolved["candidate"] == [candidate]
        return [artifact.id for artifact in resolved["model"]]

    def resolve(self, current) -> list:
        strategy = LatestBlessedStatisticsStrategy(class_names=["circle", "square"])
        resolved = strategy.resolve_artifacts(self.store, {"statistics": [current], **self.all})
        assert resolved["statistics"] == [current]
        return [artifact.id for artifact in resolved["baseline_statistics"]]


@pytest.fixture
def lineage(tmp_path: Path) -> _Lineage:
    return _Lineage(tmp_path)


def test_latest_blessed_statistics_of_a_first_run_are_none(lineage):
    _, current = lineage.data()

    assert lineage.resolve(current) == []


def test_latest_blessed_statistics_are_those_of_the_latest_blessed_models_data(lineage):
    data = [lineage.data() for _ in range(4)]
    for examples, blessed in zip((data[2][0], data[0][0], data[1][0]), (True, True, False), strict=True):
        lineage.model(examples, blessed=blessed)

    assert lineage.resolve(data[3][1]) == [data[0][1].id]


def test_latest_blessed_statistics_are_none_where_the_model_is_of_this_data(lineage):
    (older, _), (examples, current) = lineage.data(), lineage.data()
    lineage.model(older)
    lineage.model(examples)

    assert lineage.resolve(current) == []
    assert lineage.resolve(lineage.statistics(examples)) == []  # computed anew, by other settings


def test_latest_blessed_statistics_pass_over_another_class_list(lineage):
    data = [lineage.data() for _ in range(3)]
    lineage.model(data[0][0])
    lineage.model(data[1][0], class_names=("circle", "square", "triangle"))

    assert lineage.resolve(data[2][1]) == [data[0][1].id]


def test_latest_blessed_statistics_pass_over_what_is_gone(lineage):
    data = [lineage.data() for _ in range(4)]
    lineage.model(data[0][0])
    lineage.model(data[1][0])
    lineage.model(data[2][0]).unlink()
    Path(data[1][1].uri).rmdir()

    assert lineage.resolve(data[3][1]) == [data[0][1].id]


def test_latest_blessed_statistics_are_the_latest_of_their_examples(lineage):
    (examples, _), (_, current) = lineage.data(), lineage.data()
    again = lineage.statistics(examples)
    lineage.model(examples)

    assert lineage.resolve(current) == [again.id]


def test_latest_blessed_statistics_pass_over_a_model_that_no_server_could_use(lineage):
    data = [lineage.data() for _ in range(3)]
    lineage.model(data[0][0])
    lineage.model(data[1][0], servable=False)

    assert lineage.resolve(data[2][1]) == [data[0][1].id]


@pytest.fixture
def models(lineage) -> dict[str, object]:
    """A model of each kind, in the order of time."""
    examples, _ = lineage.data()
    lineage.model(examples)
    lineage.model(examples, blessed=False)
    lineage.model(examples, servable=False)
    return dict(zip(("good", "refused", "unservable"), lineage.all["model"], strict=True))


def test_latest_other_blessed_model_has_both_blessings(lineage, models):
    examples, _ = lineage.data()
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == [models["good"].id]


def test_latest_other_blessed_model_may_be_of_before_there_was_a_serving_check(lineage, models):
    examples, _ = lineage.data()
    lineage.model(examples, servable=None)
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == [lineage.all["model"][-2].id]


def test_latest_other_blessed_model_goes_by_the_latest_verdict_of_each(lineage, models):
    good = models["good"]
    refusal = lineage._put(standard_artifacts.ModelBlessing(), ("model", good))
    refusal.set_int_custom_property("blessed", 0)
    refusal.set_int_custom_property("current_model_id", good.id)
    lineage.all["model_blessing"].append(refusal)
    examples, _ = lineage.data()
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == []


def test_latest_other_blessed_model_counts_a_reused_verdict_as_of_the_run_that_reused_it(lineage, models):
    examples, _ = lineage.data()
    lineage.model(examples)
    lineage.reuse(lineage.all["model_blessing"][0])
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == [models["good"].id]


def test_latest_other_blessed_model_of_a_first_run_is_none(lineage):
    examples, _ = lineage.data()
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == []


def test_latest_other_blessed_model_of_a_blessed_candidate_is_what_it_was_compared_with(lineage, models):
    examples, _ = lineage.data()
    lineage.model(examples, baseline=models["refused"].id)
    lineage.model(examples)

    assert lineage.baseline_of(lineage.all["model"][-2]) == [lineage.all["model"][-1].id]
    lineage.all["model_blessing"].pop()
    assert lineage.baseline_of(lineage.all["model"][-2]) == [models["refused"].id]


def test_latest_other_blessed_model_of_a_run_that_was_killed_is_the_one_of_its_first_try(lineage, models):
    examples, _ = lineage.data()
    lineage.model(examples, servable=None, baseline=models["good"].id)

    assert lineage.baseline_of(lineage.all["model"][-1]) == [models["good"].id]


@pytest.mark.parametrize("is_gone", [False, True])
def test_latest_other_blessed_model_is_not_passed_over_where_it_cannot_be_evaluated(lineage, models, is_gone):
    examples, _ = lineage.data()
    labels = lineage.model(examples, class_names=("circle", "square", "triangle"))
    if is_gone:
        labels.unlink()
    lineage.model(examples, blessed=False)

    assert lineage.baseline_of(lineage.all["model"][-1]) == [lineage.all["model"][-2].id]
