"""Sabotaged models and good ones before the real gate: TFX's Evaluator, our ServingCheck and TFX's Pusher.

The images are of two colours with noise, red more than blue for a circle, so that a linear model on their mean colour is right
nine times in ten and means its probabilities; the green tells the camera. Every model is one that learnt from such images, and
most are then sabotaged in one way.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_data_validation as tfdv
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE
from tfx.components.evaluator.executor import Executor as EvaluatorExecutor
from tfx.components.pusher.executor import Executor as PusherExecutor
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_artifacts
from tfx.utils import json_utils, proto_utils

from data.features import LABELS_FILE, make_example, make_schema
from models.embeddings import find_images
from models.reference import write_reference_predictions
from models.signatures import SERVING_DEFAULT, ImageClassifier, export
from models.trained import EXTRA_FOLDER
from pipeline.components import ServingCheck
from pipeline.evaluation import Evaluation, EvaluationConfig, eval_config, read_evaluation
from pipeline.model_digest import model_digest
from pipeline.serving_check import ServingCheckConfig, read_serving_check
from preprocessing.transform import TransformGraph

pytestmark = pytest.mark.one_stack

LIMITS = {"max_overconfidence": 0.08}  # the rest is as by default
NUM_IMAGES = {"left": (34, 22), "right": (137, 35), "rear": (9, 3)}  # camera -> circles, squares
GREEN = {"left": 200, "right": 100, "rear": 30}
_IS_LEFT, _IS_REAR = 150, 65  # green above, and below

OTHER_CLASSES = r"its classes are circle, square, triangle; those of the data are circle, square"


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table: a model, what it is judged by, and why it is refused.

    Attributes:
      name: of the row.
      model: of `Models`.
      reasons: every one of the Evaluator, in order, as regular expressions.
      serving_reasons: every one of the serving check.
      baseline: the latest blessed model; empty for none.
      evaluation: settings that are not `LIMITS`.
      serving_check: settings that are not the default; None to lend the verdict on the good model, and save 8 seconds.
    """

    name: str
    model: str
    reasons: tuple[str, ...] = ()
    serving_reasons: tuple[str, ...] = ()
    baseline: str = ""
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    serving_check: dict[str, Any] | None = None


def _missed(subject: str, value: str, *, examples: int, limit: str, setting: str) -> str:
    return rf"{subject} is {value} with {examples} examples; the limit is {re.escape(f'{limit} (evaluation.{setting})')}"


def _worse(subject: str, *, examples: int, limit: str, setting: str) -> str:
    interval = r"\(95 % interval 0\.\d{3} to 0\.\d{3}\)"
    return (
        rf"{subject} is 0\.\d{{3}} lower than the latest blessed model's {interval}, with {examples} examples; the limit is "
        rf"{re.escape(f'{limit} (evaluation.{setting})')}"
    )


def _unanswered(problem: str) -> str:
    return rf"the model cannot be used: {problem} \(240 of 240 test images got no answer\)"


def _incomparable(problem: str) -> str:
    return (
        rf"the latest blessed model cannot be evaluated on this data: {problem}\. Where that is meant to be, set "
        r'evaluation\.compare_with to "nothing" for one run, whose model then is judged by itself alone'
    )


USERS_THRESHOLDS = {
    "thresholds": (
        {"metric": "recall", "class": "square", "slice": "camera=left", "min": 0.5},
        {"metric": "roc_auc", "min": 0.9},
        {"metric": "log_loss", "max": 0.35},
        {"metric": "macro_f1", "max_worsening": 0.05},
    ),
    # Nothing else is to refuse the model that misses them.
    "min_class_accuracy": 0,
    "max_accuracy_drop": 1,
    "max_class_accuracy_drop": 1,
    "max_slice_accuracy_drop": 1,
}

REFUSED = (
    Case(
        "shuffled labels",
        "of shuffled labels",
        (
            _missed("accuracy over all test images", r"0\.5\d\d", examples=240, limit="0.7", setting="min_accuracy"),
            _missed("recall of `square`", r"0\.\d{3}", examples=60, limit="0.5", setting="min_class_accuracy"),
            _missed("accuracy on `camera=left`", r"0\.\d{3}", examples=56, limit="0.6", setting="min_slice_accuracy"),
            _missed("accuracy on `camera=right`", r"0\.5\d\d", examples=172, limit="0.6", setting="min_slice_accuracy"),
        ),
    ),
    Case(
        "one class never predicted",
        "without squares",
        (_missed("recall of `square`", r"0\.000", examples=60, limit="0.5", setting="min_class_accuracy"),),
    ),
    Case(
        "one slice broken",
        "broken on the left",
        (_missed("accuracy on `camera=left`", r"0\.393", examples=56, limit="0.6", setting="min_slice_accuracy"),),
    ),
    Case(
        "overconfident",
        "overconfident",
        (
            _missed(
                "overconfidence over all test images", r"0\.1\d\d", examples=240, limit="0.08", setting="max_overconfidence"
            ),
        ),
    ),
    Case(
        "slower than its budget",
        "slow",
        serving_reasons=(
            r"a batch of 1 takes [\d,]+ ms \(99th percentile of \d+ calls\); the budget is 10 ms "
            r"\(serving_check\.max_latency_ms\)",
        ),
        serving_check={"max_latency_ms": 10},
    ),
    Case(
        "another resize in serving",
        "of another resize",
        serving_reasons=(
            r"the exported model's answers differ from the trainer's by up to 0\.\d+ on 64 images; the limit is 0\.001 "
            r"\(serving_check\.max_difference\): training and serving do not see the same image, or do not have the same "
            "weights",
        ),
        serving_check={},
    ),
    Case("a class too many", "of three classes", (_unanswered(OTHER_CLASSES),)),
    Case(
        "an output too many",
        "of three outputs",
        (_unanswered("it answers with 3 probabilities; its class list has 2"),),
    ),
    Case(
        "does not load",
        "cut",
        (_unanswered("it does not load: .*"),),
        ("the SavedModel does not load: .*",),
        serving_check={},
    ),
    Case("NaN weights", "of NaN", (_unanswered("its answers are not numbers"),)),
    Case(
        "worse than the blessed one",
        "a little against blue",
        (_worse("accuracy over all test images", examples=240, limit="0.01", setting="max_accuracy_drop"),),
        baseline="good",
    ),
    Case(
        "a class of too few images",
        "good",
        (
            r"`square` has 60 test images, too few to judge it; at least 61 are needed \(evaluation\.min_class_examples; "
            r"evaluation\.rare_classes names exceptions\)",
        ),
        evaluation={"min_class_examples": 61},
    ),
    Case("a baseline of other classes", "good", (_incomparable(OTHER_CLASSES),), baseline="of three classes"),
    Case("a baseline that is gone", "good", (_incomparable("it is gone from its place"),), baseline="gone"),
    Case(
        "beyond the thresholds of the user",
        "of blue alone",
        (
            _missed("ROC-AUC over all test images", r"0\.\d{3}", examples=240, limit="0.9", setting="thresholds"),
            _missed("log loss over all test images", r"0\.\d{3}", examples=240, limit="0.35", setting="thresholds"),
            _worse("macro f1 over all test images", examples=240, limit="0.05", setting="thresholds"),
            _missed("recall of `square` on `camera=left`", r"0\.\d{3}", examples=22, limit="0.5", setting="thresholds"),
        ),
        baseline="good",
        evaluation=USERS_THRESHOLDS,
    ),
)

PUSHED = (
    Case("the first ever", "good"),
    Case("equal within noise", "of red alone", baseline="good"),
    Case("better than the blessed one", "good", baseline="of blue alone"),
    Case("compared with nothing", "good", baseline="of three classes", evaluation={"compare_with": "nothing"}),
    Case("bad on a few images of a slice", "broken on the rear"),
    Case("a rare class", "good", evaluation={"min_class_examples": 61, "rare_classes": ("square",)}),
    Case("within the thresholds of the user", "good", baseline="of red alone", evaluation=USERS_THRESHOLDS),
)
FIRST, WITHIN_NOISE, FEW_IMAGES = PUSHED[0], PUSHED[1], PUSHED[4]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images uint8 [count, 40, 40, 3], each one's mean colour [count, 3], its class and its camera."""

    pixels: np.ndarray
    labels: np.ndarray
    cameras: Sequence[str]

    @property
    def colours(self) -> np.ndarray:
        return self.pixels.mean(axis=(1, 2))


def _make_images(seed: int) -> Images:
    random = np.random.default_rng(seed)
    facts = [
        (label, camera) for camera, counts in NUM_IMAGES.items() for label, count in enumerate(counts) for _ in range(count)
    ]
    facts = [facts[position] for position in random.permutation(len(facts))]
    labels = np.asarray([label for label, _ in facts])
    sign = 1 - 2 * labels
    red = 128 + 20 * sign + random.normal(0, 22, len(facts))
    blue = 128 - 20 * sign + random.normal(0, 36, len(facts))
    green = np.asarray([GREEN[camera] for _, camera in facts])
    colours = np.stack([red, green, blue], axis=-1)[:, None, None]
    noise = random.normal(0, 20, (len(facts), 40, 40, 3))
    return Images(np.clip(colours + noise, 0, 255).astype(np.uint8), labels, [camera for _, camera in facts])


def _write(path: Path, images: Images, encode: Callable[..., bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
        for number, (pixels, label, camera) in enumerate(zip(images.pixels, images.labels, images.cameras, strict=True)):
            example = make_example(
                image=encode(pixels),
                label=CLASS_NAMES[label],
                filename=f"{number}.png",
                height=40,
                width=40,
                brightness=0.5,
                channels=3,
                columns={"camera": camera},
            )
            writer.write(example.SerializeToString())


def _fit(
    images: Images, *, channels: Sequence[int] = (0, 2), labels: np.ndarray | None = None, is_balanced: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Learns from mean colours by linear discriminant analysis, whose probabilities are those of such images.

    Returns:
      Weights [3, 2] and biases [2] of the logits, 0 for channels that are not looked at.
    """
    colours = images.colours[:, channels]
    labels = images.labels if labels is None else labels
    groups = [colours[labels == index] for index in range(2)]
    covariance = sum(np.cov(group.T) * (len(group) - 1) for group in groups) / (len(colours) - 2)
    inverse = np.linalg.inv(np.atleast_2d(covariance))
    means = [group.mean(axis=0) for group in groups]
    prior = [0.5 if is_balanced else len(group) / len(colours) for group in groups]
    weights = np.zeros((3, 2))
    weights[list(channels)] = np.stack([inverse @ mean for mean in means], axis=1)
    return weights, np.asarray([-0.5 * mean @ inverse @ mean for mean in means]) + np.log(prior)


def _network(
    weights: np.ndarray, biases: np.ndarray, change: Callable[[Any, Any], Any] = lambda colour, logits: logits
) -> keras.Model:
    """Makes a network of the mean colour; `change` takes the colour [batch, 3] and the logits and gives other logits."""
    images = keras.Input((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3))
    colour = keras.layers.GlobalAveragePooling2D()(images)
    dense = keras.layers.Dense(weights.shape[1])
    network = keras.Model(images, keras.layers.Softmax()(change(colour, dense(colour))))
    dense.set_weights([weights, biases])
    return network


class WithImageFunction:
    """A Transform graph whose images are made otherwise."""

    def __init__(self, graph: TransformGraph, images: Callable[[tf.Tensor], tf.Tensor]):
        function = tf.function(images, autograph=False)
        self.images = function.get_concrete_function(tf.TensorSpec([None], tf.string))
        self.labels = graph.labels


def slow_down(images: tf.Tensor, *, num_steps: int) -> tf.Tensor:
    """Gives images as they are after so many steps, of some 3 microseconds, which no more cores make faster."""
    (count,) = tf.while_loop(lambda count: count < num_steps, lambda count: [count + 1], [0])
    with tf.control_dependencies([count]):
        return tf.identity(images)


class ServesOtherwise(ImageClassifier):
    """A classifier of which `serving_default` alone makes the images otherwise."""

    def __init__(self, network: keras.Model, transform: TransformGraph, class_names: Sequence[str], served: WithImageFunction):
        super().__init__(network, transform, class_names)
        self.served = ImageClassifier(network, served, class_names)

    def signatures(self) -> dict[str, Any]:
        return super().signatures() | {SERVING_DEFAULT: self.served.signatures()[SERVING_DEFAULT]}


class Models:
    """Makes each model once, as the Trainer leaves it, and the folder of its training run."""

    def __init__(self, folder: Path, transform_graph: str, encode: Callable[..., bytes]):
        self._folder = folder
        self._transform = TransformGraph(transform_graph)
        self._images = _make_images(seed=6)
        _write(folder / "valid" / "valid.tfrecord.gz", self._images, encode)

    def __getitem__(self, name: str) -> tuple[Path, Path]:
        model, run = self._folder / name / "model", self._folder / name / "run"
        if name != "gone" and not model.exists():
            self._make(name, model / "Format-Serving", run)
        return model, run

    def _make(self, name: str, model: Path, run: Path) -> None:
        network, names = self._network_of(name)
        export(self._classifier_of(name, network, names), str(model))
        (model / EXTRA_FOLDER).mkdir()
        listed = CLASS_NAMES if name == "of three outputs" else names
        (model / EXTRA_FOLDER / LABELS_FILE).write_text("".join(f"{line}\n" for line in listed))
        if name == "cut":
            graph = model / "saved_model.pb"
            graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
        run.mkdir()
        valid = find_images([str(self._folder / "valid" / "*")], split="valid")
        write_reference_predictions(network, self._transform, valid, folder=str(run))

    def _network_of(self, name: str) -> tuple[keras.Model, Sequence[str]]:
        """Returns the network in the trainer's memory and its class list."""
        weights, biases = _fit(self._images)
        if name in ("of red alone", "of blue alone"):
            weights, biases = _fit(self._images, channels=[0 if "red" in name else 2])
        if name == "a little against blue":
            biases = biases + 1.2 * 128 * weights[2]  # the mean image stays where it was
            weights[2] *= -0.2
        if name == "of shuffled labels":
            labels = np.random.default_rng(2).permutation(self._images.labels)
            weights, biases = _fit(self._images, labels=labels, is_balanced=True)
        if name == "without squares":
            weights, biases = 0 * weights, np.log([0.75, 0.25])  # as often as there are
        if name == "overconfident":
            weights, biases = 100 * weights, 100 * biases
        if name == "of NaN":
            weights = np.full_like(weights, np.nan)
        if name.startswith("of three"):
            weights, biases = np.pad(weights, [(0, 0), (0, 1)]), np.append(biases, -100.0)
            return _network(weights, biases), (*CLASS_NAMES, "triangle")
        changes = {
            # A little more square than circle, whatever the image is.
            "broken on the left": lambda colour, logits: keras.ops.where(
                colour[:, 1:2] > _IS_LEFT, 0 * logits + np.asarray([0.0, 0.05], np.float32), logits
            ),
            "broken on the rear": lambda colour, logits: keras.ops.where(colour[:, 1:2] < _IS_REAR, -logits, logits),
        }
        return _network(weights, biases, *([changes[name]] if name in changes else [])), CLASS_NAMES

    def _classifier_of(self, name: str, network: keras.Model, names: Sequence[str]) -> ImageClassifier:
        """Returns what is exported of it."""
        images = self._transform.images

        def slow(encoded: tf.Tensor) -> tf.Tensor:
            return slow_down(images(encoded), num_steps=10_000)

        def resize(encoded: tf.Tensor) -> tf.Tensor:
            def one(image: tf.Tensor) -> tf.Tensor:
                decoded = tf.io.decode_image(image, channels=3, expand_animations=False)
                return tf.image.resize(decoded, [TRANSFORM_IMAGE_SIZE] * 2)  # bilinear, and not antialiased

            return tf.map_fn(one, encoded, fn_output_signature=tf.float32)

        if name == "slow":
            return ImageClassifier(network, WithImageFunction(self._transform, slow), names)
        if name == "of another resize":
            return ServesOtherwise(network, self._transform, names, WithImageFunction(self._transform, resize))
        return ImageClassifier(network, self._transform, names)


def make_artifact(kind: type, folder: Path) -> Any:
    artifact = kind()
    artifact.uri = str(folder)
    return artifact


def run_evaluator(model: Path, baseline: Path | None, specification: Any, *, examples: Any, schema: Any, folder: Path) -> Any:
    """Runs TFX's Evaluator on the split `test`, as `pipeline.pipeline` has it; its blessing, beside `folder/evaluation`."""
    inputs = {"examples": [examples], "schema": [schema], "model": [make_artifact(standard_artifacts.Model, model)]}
    if baseline:
        inputs["baseline_model"] = [make_artifact(standard_artifacts.Model, baseline)]
    outputs = {
        "evaluation": [make_artifact(standard_artifacts.ModelEvaluation, folder / "evaluation")],
        "blessing": [make_artifact(standard_artifacts.ModelBlessing, folder / "blessing")],
    }
    properties = {
        "eval_config": proto_utils.proto_to_json(specification),
        "example_splits": json_utils.dumps(["test"]),
        "module_path": "pipeline.extractors",
    }
    context = EvaluatorExecutor.Context(
        beam_pipeline_args=["--runner=FnApiRunner"], tmp_dir=str(folder / "temporary"), unique_id="1"
    )
    EvaluatorExecutor(context).Do(inputs, outputs, properties)
    return outputs["blessing"][0]


def run_serving_check(model: Path, run: Path, config: ServingCheckConfig, *, blessing: Any, folder: Path) -> Any:
    """Runs our ServingCheck; its blessing."""
    inputs = {
        "model": [make_artifact(standard_artifacts.Model, model)],
        "model_run": [make_artifact(standard_artifacts.ModelRun, run)],
        "model_blessing": [blessing],
    }
    (folder / "infra_blessing").mkdir(parents=True)
    outputs = {"infra_blessing": [make_artifact(standard_artifacts.InfraBlessing, folder / "infra_blessing")]}
    properties = {"config": config.model_dump_json(), "code": ""}
    ServingCheck.EXECUTOR_SPEC.executor_class().Do(inputs, outputs, properties)
    return outputs["infra_blessing"][0]


def run_pusher(model: Path, *, blessing: Any, infra_blessing: Any, folder: Path) -> tuple[bool, list[Path]]:
    """Runs TFX's Pusher; what it says of itself, and what is in the serving folder."""
    inputs = {
        "model": [make_artifact(standard_artifacts.Model, model)],
        "model_blessing": [blessing],
        "infra_blessing": [infra_blessing],
    }
    outputs = {"pushed_model": [make_artifact(standard_artifacts.PushedModel, folder / "pushed_model")]}
    serving = folder / "serving_model"
    destination = pusher_pb2.PushDestination(filesystem=pusher_pb2.PushDestination.Filesystem(base_directory=str(serving)))
    PusherExecutor().Do(inputs, outputs, {"push_destination": proto_utils.proto_to_json(destination)})
    says_pushed = outputs["pushed_model"][0].get_int_custom_property("pushed") == 1
    return says_pushed, sorted(serving.iterdir()) if serving.exists() else []


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gate said, and where Pusher would have put the model."""

    evaluation: Evaluation
    evaluator_blessed: bool
    serving_reasons: list[str]
    serving_blessed: bool
    says_pushed: bool
    versions: list[Path]


class Gate:
    """The three components, on the same test images, each called as TFX calls it."""

    def __init__(self, folder: Path, models: Models, encode: Callable[..., bytes]):
        self._models = models
        self._folder = folder
        self._examples = make_artifact(standard_artifacts.Examples, folder / "examples")
        self._examples.split_names = artifact_utils.encode_split_names(["test"])
        _write(Path(artifact_utils.get_split_uri([self._examples], "test"), "test.tfrecord.gz"), _make_images(seed=7), encode)
        self._schema = make_artifact(standard_artifacts.Schema, folder / "schema")
        (folder / "schema").mkdir()
        tfdv.write_schema_text(make_schema(CLASS_NAMES, ["camera"]), str(folder / "schema" / "schema.pbtxt"))
        self._good_verdict: Any = None
        self._verdicts: dict[str, Verdict] = {}

    def judge(self, case: Case) -> Verdict:
        if case.name not in self._verdicts:
            self._verdicts[case.name] = self._judge(case, self._folder / case.name)
        return self._verdicts[case.name]

    def _judge(self, case: Case, folder: Path) -> Verdict:
        (model, run), baseline = self._models[case.model], self._models[case.baseline][0] if case.baseline else None
        config = EvaluationConfig.model_validate(LIMITS | case.evaluation)
        specification = eval_config(config, CLASS_NAMES, ["camera"], image_size=TRANSFORM_IMAGE_SIZE, code="")
        blessing = run_evaluator(model, baseline, specification, examples=self._examples, schema=self._schema, folder=folder)
        if case.serving_check is None:
            infra_blessing = self._lend_serving_verdict()
        else:
            infra_blessing = run_serving_check(
                model, run, ServingCheckConfig(**case.serving_check), blessing=blessing, folder=folder
            )
        says_pushed, versions = run_pusher(model, blessing=blessing, infra_blessing=infra_blessing, folder=folder)
        return Verdict(
            evaluation=read_evaluation(str(folder / "evaluation"), CLASS_NAMES),
            evaluator_blessed=blessing.get_int_custom_property("blessed") == 1,
            serving_reasons=read_serving_check(infra_blessing.uri)["reasons"],
            serving_blessed=infra_blessing.get_int_custom_property("blessed") == 1,
            says_pushed=says_pushed,
            versions=versions,
        )

    def _lend_serving_verdict(self) -> Any:
        """Returns the serving check's blessing of the good model."""
        if self._good_verdict is None:
            self._good_verdict = run_serving_check(
                *self._models["good"],
                ServingCheckConfig(),
                blessing=standard_artifacts.ModelBlessing(),
                folder=self._folder / "the good model",
            )
        return self._good_verdict


@pytest.fixture(scope="module")
def models(tmp_path_factory, transform_graph, encode) -> Models:
    return Models(tmp_path_factory.mktemp("models"), transform_graph, encode)


@pytest.fixture(scope="module")
def gate(tmp_path_factory, models, encode) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"), models, encode)


def _named(cases: Sequence[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name.replace(" ", "_") for case in cases])


def _assert_match(reasons: Sequence[str], expected: Sequence[str]) -> None:
    assert len(reasons) == len(expected), "\n".join(reasons)
    for reason, pattern in zip(reasons, expected, strict=True):
        assert re.fullmatch(pattern, reason)


@_named(REFUSED)
def test_gate_refuses_a_bad_model_for_the_right_reason(gate, case):
    verdict = gate.judge(case)

    _assert_match(verdict.evaluation.reasons, case.reasons)
    _assert_match(verdict.serving_reasons, case.serving_reasons)
    # Most of them are blessed by one of the two; it takes both.
    assert verdict.evaluator_blessed is not bool(case.reasons)
    assert verdict.serving_blessed is not bool(case.serving_reasons)
    assert not verdict.says_pushed
    assert verdict.versions == []


@_named(PUSHED)
def test_gate_pushes_a_good_model(gate, models, case):
    verdict = gate.judge(case)

    assert verdict.evaluation.reasons == verdict.serving_reasons == []
    assert verdict.evaluator_blessed
    assert verdict.serving_blessed
    assert verdict.says_pushed
    (version,) = verdict.versions
    assert model_digest(str(version)) == model_digest(str(models[case.model][0] / "Format-Serving"))


def test_gate_judges_the_first_model_by_itself_alone(gate):
    assert not gate.judge(FIRST).evaluation.has_baseline


def test_gate_lets_a_drop_through_that_is_above_its_limit_and_within_the_noise(gate):
    change = gate.judge(WITHIN_NOISE).evaluation.baseline["changes"]["accuracy"]

    assert change["change"] < -EvaluationConfig().max_accuracy_drop
    low, high = change["interval"]
    assert low < change["change"] < 0 < high


def test_gate_lists_a_slice_of_few_images_that_it_does_not_judge(gate):
    rear = gate.judge(FEW_IMAGES).evaluation.slices["camera=rear"]

    assert rear["example_count"] == sum(NUM_IMAGES["rear"]) < EvaluationConfig().min_slice_examples
    assert rear["accuracy"] < EvaluationConfig().min_slice_accuracy
