"""Predicts the images of a Pub/Sub subscription: the stream for the cloud, a streaming job on Dataflow.

A message is an image, or says where one lies: as text gs://..., or as a bucket's notification of a new object. Dataflow gives
each message to the job once, also when Pub/Sub delivers it twice; what is published twice counts once where the publisher sets
the attribute `id`. Of a bucket's notifications only those of new objects count. Called by `pipeline.predict`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io import fileio
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.transforms.trigger import AccumulationMode, AfterCount, AfterWatermark

from data.errors import InputError
from data.inspection import ImageLimits
from pipeline.answers import BIGQUERY, BIGQUERY_SCHEMA, bigquery_row, bigquery_table, to_json_line, without_facts
from pipeline.inference import BATCH_SIZE, Chunk, PredictImages, find_model
from pipeline.inputs import InputImage
from pipeline.model_digest import model_digest

ID_ATTRIBUTE = "id"
FILE_ATTRIBUTE = "file"  # names an image that is in the message itself
_WINDOW_SECONDS = 60  # of the files in a bucket
_ANSWERED, _DEAD = "answered", "dead"


def predict_subscription(
    subscription: str,
    output: str,
    *,
    model: str,
    dead_letter: str = "",
    max_age_seconds: float | None = None,
    beam_args: Sequence[str],
    limits: ImageLimits | None = None,
) -> str:
    """Starts the streaming job and leaves it running.

    Args:
      subscription: projects/P/subscriptions/S.
      output: for the answers: gs://folder, projects/P/topics/T or bigquery:project.dataset.table.
      model: folder of the SavedModel, or of its versions, of which the newest now is taken; gs:// for Dataflow.
      dead_letter: for images without an answer, as `output`; the same where empty.
      max_age_seconds: messages published longer ago are late, and go to the dead letters; None for any age.
      beam_args: options of Beam, such as `--runner=DataflowRunner`.
      limits: of the images.

    Returns:
      The job's name.

    Raises:
      InputError: if a name is none.
    """
    if not (subscription.startswith("projects/") and "/subscriptions/" in subscription):
        raise InputError(f"Expected --subscription to be projects/P/subscriptions/S. Received: {subscription!r}.")
    for option, place in (("--output", output), ("--dead-letter", dead_letter or output)):
        if not place.startswith((BIGQUERY, "gs://")) and "/topics/" not in place:
            raise InputError(
                f"Expected {option} to be gs://folder, projects/P/topics/T or {BIGQUERY}project.dataset.table. "
                f"Received: {place!r}. Name one of these."
            )
    if not any(argument.startswith("--runner") for argument in beam_args):
        raise InputError(
            "Expected the options of Beam for a subscription. Received: none. Give -- --runner=DataflowRunner --project=P "
            "--region=R --temp_location=gs://B/tmp."
        )
    folder = find_model(model)
    options = PipelineOptions(list(beam_args), save_main_session=False)
    options.view_as(StandardOptions).streaming = True
    pipeline = beam.Pipeline(options=options)
    build_subscription_job(
        pipeline,
        subscription,
        output,
        dead_letter=dead_letter or output,
        model=folder,
        digest=model_digest(folder),
        max_age_seconds=max_age_seconds,
        limits=limits or ImageLimits(),
    )
    result = pipeline.run()
    return str(result.job_id() if hasattr(result, "job_id") else result)


def build_subscription_job(
    pipeline: beam.Pipeline,
    subscription: str,
    output: str,
    *,
    dead_letter: str,
    max_age_seconds: float | None = None,
    **predict: Any,
) -> None:
    """Adds all steps from the subscription to the outputs.

    Args:
      pipeline: to add to.
      subscription: projects/P/subscriptions/S.
      output: for the answers.
      dead_letter: for images without one.
      max_age_seconds: see `predict_subscription`.
      **predict: `model`, `digest` and `limits`, for `predict_messages`.
    """
    messages = pipeline | "Read Pub/Sub" >> beam.io.ReadFromPubSub(
        subscription=subscription, id_label=ID_ATTRIBUTE, with_attributes=True
    )
    answered, dead = predict_messages(messages, max_age_seconds=max_age_seconds, **predict)
    write_rows(answered, output, name="answers")
    write_rows(dead, dead_letter, name="dead_letters")


def predict_messages(
    messages: beam.PCollection, *, model: str, digest: str, limits: ImageLimits, max_age_seconds: float | None = None
) -> tuple[beam.PCollection, beam.PCollection]:
    """Adds the steps between the messages and their rows.

    Args:
      messages: of `PubsubMessage`.
      model: folder of the SavedModel.
      digest: of its files.
      limits: of the images.
      max_age_seconds: see `predict_subscription`.

    Returns:
      The rows with an answer, and those with an error.
    """
    rows = (
        messages
        | "Read messages" >> beam.ParDo(ReadMessages(max_age_seconds))
        | "Predict" >> PredictImages(model, digest=digest, limits=limits, max_chunks=BATCH_SIZE)
        | "Take rows" >> beam.FlatMap(lambda chunk: chunk[1])
        | "Tell answers from errors" >> beam.Partition(lambda row, _: int("error" in row), 2)
    )
    return rows[0], rows[1]


class ReadMessages(beam.DoFn):
    """Makes a chunk of one image of each message. Only buckets are read, never a file of the worker's."""

    def __init__(self, max_age_seconds: float | None):
        self._max_age_seconds = max_age_seconds

    def process(self, message: PubsubMessage) -> Iterator[Chunk]:
        """Yields a `Chunk`, or nothing for a notification of anything but a new object."""
        attributes = message.attributes or {}
        name = message.message_id or attributes.get(ID_ATTRIBUTE) or "message"
        if "bucketId" in attributes and "objectId" in attributes:
            if attributes.get("eventType", "OBJECT_FINALIZE") != "OBJECT_FINALIZE":
                return
            image = InputImage(f"gs://{attributes['bucketId']}/{attributes['objectId']}")
        elif message.data.startswith(b"gs://"):
            image = InputImage(message.data.decode("utf-8", "replace").strip())
        else:
            image = InputImage(attributes.get(FILE_ATTRIBUTE, name), encoded=message.data)
        published = message.publish_time.timestamp() if message.publish_time else None
        if published is not None and self._max_age_seconds is not None and time.time() - published > self._max_age_seconds:
            late = f"it came late: it is {time.time() - published:,.0f} s old; the limit is {self._max_age_seconds:g}"
            image = InputImage(image.file, encoded=image.encoded, problem=late)
        elif image.encoded == b"":
            image = InputImage(image.file, problem="the message is empty")
        yield Chunk(name, (image,))


def write_rows(rows: beam.PCollection, place: str, *, name: str) -> None:
    """Adds the steps that write rows to a topic, a table, or JSON lines in a bucket, a file for each minute.

    Args:
      rows: to write.
      place: projects/P/topics/T, bigquery:project.dataset.table, or a folder.
      name: of the step and the files.
    """
    if place.startswith(BIGQUERY):
        _ = (
            rows
            | f"As BigQuery has {name}" >> beam.Map(bigquery_row)
            | f"Insert {name}"
            >> beam.io.WriteToBigQuery(
                bigquery_table(place),
                schema=BIGQUERY_SCHEMA,
                method=beam.io.WriteToBigQuery.Method.STREAMING_INSERTS,
                create_disposition=beam.io.BigQueryDisposition.CREATE_IF_NEEDED,
                write_disposition=beam.io.BigQueryDisposition.WRITE_APPEND,
            )
        )
        return
    lines = rows | f"As JSON, {name}" >> beam.Map(lambda row: to_json_line(without_facts(row)).rstrip("\n"))
    if "/topics/" in place and "://" not in place:
        _ = lines | f"Encode {name}" >> beam.Map(str.encode) | f"Publish {name}" >> beam.io.WriteToPubSub(place)
        return
    windows = beam.WindowInto(
        beam.window.FixedWindows(_WINDOW_SECONDS),
        trigger=AfterWatermark(late=AfterCount(1)),  # without the latter, what comes late would be lost
        accumulation_mode=AccumulationMode.DISCARDING,
        allowed_lateness=24 * 3600,
    )
    _ = (
        lines
        # Batching for the model loses the messages' times; a file is of the minute in which its images were answered.
        | f"Time of {name}" >> beam.Map(lambda line: beam.window.TimestampedValue(line, time.time()))
        | f"A minute of {name}" >> windows
        | f"Write {name}"
        >> fileio.WriteToFiles(
            place, file_naming=fileio.default_file_naming(name, ".jsonl"), sink=lambda _: fileio.TextSink(), shards=1
        )
    )
