"""The pipeline that a team writes after TFX's tutorials: the yardstick of `whole_run.py`, never run by a user.

Everything as the tutorials have it: `from tfx import v1`, statistics over every feature, an inferred schema, a Transform with
an analyzer that materializes its output (resized images, encoded again, which is kinder than the float images of the cifar10
tutorial), a Trainer that runs the frozen backbone in every epoch with `model.fit`, Resolver, Evaluator, Pusher. The backbone,
its weights, the records and the number of epochs are this project's.

    python tests/benchmarks/tutorial_pipeline.py --records runs/elpv/tfrecords --workspace DIR --epochs 10
"""

import argparse
import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, _ROOT)

import keras
import tensorflow as tf
import tensorflow_transform as tft
from tensorflow_model_analysis.proto import config_pb2
from tfx import v1 as tfx

from data.features import SPLITS
from models.efficientnet_lite import LITE0, efficientnet_lite, load_imagenet_weights

IMAGE_SIZE = 224
BATCH_SIZE = 64


def preprocessing_fn(inputs):
    """Resizes and encodes the images again; learns the label vocabulary from the data."""

    def resize(encoded):
        image = tf.io.decode_image(encoded[0], channels=3, expand_animations=False)
        image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))
        return tf.io.encode_jpeg(tf.cast(image, tf.uint8), quality=95)

    return {
        "image_xf": tf.map_fn(resize, inputs["image"], fn_output_signature=tf.string),
        "label_xf": tft.compute_and_apply_vocabulary(inputs["label"], vocab_filename="label"),
    }


def run_fn(fn_args):
    """Trains a head on the frozen backbone with `model.fit`, the backbone inside the model."""
    transform = tft.TFTransformOutput(fn_args.transform_output)
    num_classes = transform.vocabulary_size_by_name("label")

    def decode(encoded):
        return tf.ensure_shape(
            tf.map_fn(
                lambda image: tf.cast(tf.io.decode_jpeg(image, channels=3), tf.float32),
                tf.reshape(encoded, [-1]),
                fn_output_signature=tf.float32,
            ),
            (None, IMAGE_SIZE, IMAGE_SIZE, 3),
        )

    def dataset(patterns, *, is_training):
        ds = tf.data.Dataset.list_files(patterns).interleave(
            lambda path: tf.data.TFRecordDataset(path, compression_type="GZIP")
        )
        ds = ds.shuffle(1000) if is_training else ds

        def parse(serialized):
            features = tf.io.parse_example(serialized, transform.transformed_feature_spec())
            return decode(features["image_xf"]), tf.reshape(features["label_xf"], [-1])

        return ds.batch(BATCH_SIZE).map(parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    network = efficientnet_lite(LITE0, image_size=IMAGE_SIZE)
    load_imagenet_weights(LITE0, network)
    backbone = keras.Model(network.input, network.outputs[-1])
    backbone.trainable = False
    image = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    x = keras.layers.GlobalAveragePooling2D()(backbone(image, training=False))
    probabilities = keras.layers.Dense(num_classes, activation="softmax")(x)
    model = keras.Model(image, probabilities)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # the default would choose XLA, which is many times slower on a CPU
    )
    model.fit(
        dataset(fn_args.train_files, is_training=True),
        validation_data=dataset(fn_args.eval_files, is_training=False),
        epochs=fn_args.custom_config["epochs"],
        verbose=2,
    )

    module = tf.Module()
    module.model = model
    module.transform_layer = transform.transform_features_layer()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serving_default(examples):
        features = module.transform_layer(tf.io.parse_example(examples, {"image": tf.io.FixedLenFeature([1], tf.string)}))
        return {"probabilities": model(decode(features["image_xf"]), training=False)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def transform_features(examples):
        label = module.transform_layer(tf.io.parse_example(examples, {"label": tf.io.FixedLenFeature([1], tf.string)}))[
            "label_xf"
        ]
        return {"label_xf": label}

    tf.saved_model.save(
        module,
        fn_args.serving_model_dir,
        signatures={"serving_default": serving_default, "transform_features": transform_features},
    )


def create_pipeline(records: str, workspace: str, epochs: int) -> tfx.dsl.Pipeline:
    """Composes the tutorials' components."""
    example_gen = tfx.components.ImportExampleGen(
        input_base=records,
        input_config=tfx.proto.Input(
            splits=[tfx.proto.Input.Split(name=name, pattern=f"{name}-*.tfrecord.gz") for name in SPLITS]
        ),
    )
    statistics_gen = tfx.components.StatisticsGen(examples=example_gen.outputs["examples"])
    schema_gen = tfx.components.SchemaGen(statistics=statistics_gen.outputs["statistics"], infer_feature_shape=True)
    example_validator = tfx.components.ExampleValidator(
        statistics=statistics_gen.outputs["statistics"], schema=schema_gen.outputs["schema"]
    )
    transform = tfx.components.Transform(
        examples=example_gen.outputs["examples"],
        schema=schema_gen.outputs["schema"],
        module_file=os.path.abspath(__file__),
    )
    trainer = tfx.components.Trainer(
        module_file=os.path.abspath(__file__),
        examples=transform.outputs["transformed_examples"],
        transform_graph=transform.outputs["transform_graph"],
        schema=schema_gen.outputs["schema"],
        train_args=tfx.proto.TrainArgs(splits=["train"]),
        eval_args=tfx.proto.EvalArgs(splits=["valid"]),
        custom_config={"epochs": epochs},
    )
    resolver = tfx.dsl.Resolver(
        strategy_class=tfx.dsl.experimental.LatestBlessedModelStrategy,
        model=tfx.dsl.Channel(type=tfx.types.standard_artifacts.Model),
        model_blessing=tfx.dsl.Channel(type=tfx.types.standard_artifacts.ModelBlessing),
    ).with_id("latest_blessed_model_resolver")
    evaluator = tfx.components.Evaluator(
        examples=example_gen.outputs["examples"],
        example_splits=["test"],
        model=trainer.outputs["model"],
        baseline_model=resolver.outputs["model"],
        eval_config=config_pb2.EvalConfig(
            model_specs=[
                config_pb2.ModelSpec(
                    signature_name="serving_default",
                    preprocessing_function_names=["transform_features"],
                    label_key="label_xf",
                    prediction_key="probabilities",
                )
            ],
            slicing_specs=[config_pb2.SlicingSpec(), config_pb2.SlicingSpec(feature_keys=["label"])],
            metrics_specs=[
                config_pb2.MetricsSpec(
                    metrics=[
                        config_pb2.MetricConfig(class_name="ExampleCount"),
                        config_pb2.MetricConfig(
                            class_name="SparseCategoricalAccuracy",
                            threshold=config_pb2.MetricThreshold(
                                value_threshold=config_pb2.GenericValueThreshold(lower_bound={"value": 0.5})
                            ),
                        ),
                    ]
                )
            ],
        ),
    )
    pusher = tfx.components.Pusher(
        model=trainer.outputs["model"],
        model_blessing=evaluator.outputs["blessing"],
        push_destination=tfx.proto.PushDestination(
            filesystem=tfx.proto.PushDestination.Filesystem(base_directory=os.path.join(workspace, "serving_model"))
        ),
    )
    return tfx.dsl.Pipeline(
        pipeline_name="tutorial",
        pipeline_root=os.path.join(workspace, "pipeline"),
        metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
            os.path.join(workspace, "metadata.db")
        ),
        components=[
            example_gen,
            statistics_gen,
            schema_gen,
            example_validator,
            transform,
            trainer,
            resolver,
            evaluator,
            pusher,
        ],
        enable_cache=True,
        # The tutorials leave this empty; Beam then asks the network for a Go binary before it falls back to this runner.
        beam_pipeline_args=["--runner=FnApiRunner", "--sdk_container_image=unused"],
    )


def main() -> None:
    """Runs the tutorial pipeline."""
    parser = argparse.ArgumentParser(description="Runs the tutorial-style pipeline.")
    parser.add_argument("--records", required=True, help="folder of TFRecords that data.prepare wrote")
    parser.add_argument("--workspace", required=True, help="folder for everything that the run makes")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    tfx.orchestration.LocalDagRunner().run(create_pipeline(arguments.records, arguments.workspace, arguments.epochs))


if __name__ == "__main__":
    main()
