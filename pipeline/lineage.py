"""What a model was made of: its settings and code, the transform graph, and the images that it saw.

    python -m pipeline.report --lineage runs/elpv/serving_model/1795624516 --images images.csv

Reading the records takes two seconds for 2,600 images. Called by `pipeline.history`.
"""

import contextlib
import csv
import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_metadata as mlmd
import rich.box
import tensorflow as tf
from ml_metadata.proto import metadata_store_pb2
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tfx.types import artifact_utils

from data.errors import InputError
from data.features import FILENAME_KEY, LABEL_KEY
from models.trainer import CONFIG_KEY

_NUM_PARSED = 16  # records at once; their images are read, too, and may be large


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What one model was made of.

    Attributes:
      model_id: of the Model artifact.
      model: its folder.
      trained: when, in milliseconds since 1970 (UTC).
      settings: the trainer's, by section; its code's fingerprint is `code`.
      splits_trained: that the weights were fitted to.
      splits_watched: by which the training was stopped and the best weights were chosen.
      preprocessing: settings and code's fingerprint of the Transform component.
      transform_graph: its folder, or None.
      examples: folder of the Examples artifact, or None.
      splits: of the examples.
      records: folder of the records that they were read from.
      fingerprint: of the records: size and time of each split's files.
      started_from: id of the model that a warm start began with, or None.
    """

    model_id: int
    model: str
    trained: int
    settings: dict[str, Any]
    splits_trained: list[str]
    splits_watched: list[str]
    preprocessing: dict[str, Any]
    transform_graph: str | None
    examples: str | None
    splits: list[str]
    records: str
    fingerprint: str
    started_from: int | None


def read_lineage(store: mlmd.MetadataStore, model_id: int) -> list[Lineage]:
    """Follows a model back to the records: the model first, then the model that it started from, if any, and so on.

    Args:
      store: the metadata store.
      model_id: of a Model artifact.
    """
    chain = []
    following: int | None = model_id
    while following is not None:
        chain.append(_read_one(store, following))
        following = chain[-1].started_from
    return chain


def _read_one(store: mlmd.MetadataStore, model_id: int) -> Lineage:
    (model,) = store.get_artifacts_by_id([model_id])
    trainer = producer(store, model_id)
    inputs = input_artifacts(store, trainer)
    examples, graph = inputs.get("examples"), inputs.get("transform_graph")
    transform = graph and producer(store, graph.id)
    importer = examples and producer(store, examples.id)
    base_model = inputs.get("base_model")
    custom_config = properties(trainer).get("custom_config") or {}
    return Lineage(
        model_id=model_id,
        model=model.uri,
        trained=model.create_time_since_epoch,
        settings=custom_config.get(CONFIG_KEY, {}),
        splits_trained=list((properties(trainer).get("train_args") or {}).get("splits", [])),
        splits_watched=list((properties(trainer).get("eval_args") or {}).get("splits", [])),
        preprocessing=(properties(transform).get("custom_config") or {}) if transform else {},
        transform_graph=graph.uri if graph else None,
        examples=examples.uri if examples else None,
        splits=artifact_utils.decode_split_names(examples.properties["split_names"].string_value) if examples else [],
        records=str(properties(importer).get("input_base", "")) if importer else "",
        fingerprint=examples.custom_properties["input_fingerprint"].string_value if examples else "",
        started_from=base_model.id if base_model else None,
    )


def producer(store: mlmd.MetadataStore, artifact_id: int) -> metadata_store_pb2.Execution:
    """Returns the execution that made an artifact; later ones that reused it put it out, too."""
    executions = [
        event.execution_id
        for event in store.get_events_by_artifact_ids([artifact_id])
        if event.type == metadata_store_pb2.Event.OUTPUT
    ]
    (execution,) = store.get_executions_by_id([min(executions)])
    return execution


def input_artifacts(
    store: mlmd.MetadataStore, execution: metadata_store_pb2.Execution
) -> dict[str, metadata_store_pb2.Artifact]:
    """Returns an execution's inputs by their key."""
    events = store.get_events_by_execution_ids([execution.id])
    keys = {event.artifact_id: event.path.steps[0].key for event in events if event.type == metadata_store_pb2.Event.INPUT}
    return {keys[artifact.id]: artifact for artifact in store.get_artifacts_by_id(sorted(keys))}


def output_artifacts(store: mlmd.MetadataStore, executions: Sequence[int]) -> list[metadata_store_pb2.Artifact]:
    """Returns the outputs of executions, by their ids; those of a component that reused an earlier result, too."""
    events = store.get_events_by_execution_ids(executions)
    return store.get_artifacts_by_id(sorted({event.artifact_id for event in events if event.type == event.OUTPUT}))


def properties(execution: metadata_store_pb2.Execution) -> dict[str, Any]:
    """Returns an execution's parameters, those that are JSON decoded."""
    found = {}
    for name, value in [*execution.properties.items(), *execution.custom_properties.items()]:
        kind = value.WhichOneof("value")
        content = getattr(value, kind) if kind else None
        if isinstance(content, str) and content[:1] in ("{", "["):
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(content)
        found[name] = None if content == "null" else content
    return found


def write_images(chain: Sequence[Lineage], path: str | None) -> dict[str, Counter | None]:
    """Counts the images that a model saw, per split and class, and lists them in a CSV file.

    Args:
      chain: as `read_lineage` gives it; images that several of its models saw count once.
      path: of the CSV file (filename, label, split), written whole or not at all; None to count only.

    Returns:
      Split -> class -> number of images; None for examples that are gone.

    Raises:
      InputError: if the CSV file cannot be written.
    """
    counts: dict[str, Counter | None] = {}
    temporary = Path(f"{path}.tmp") if path else None
    try:
        # Names of files need not be UTF-8; their bytes come out as they went in.
        with (
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="")
            if temporary
            else contextlib.nullcontext()
        ) as file:
            rows = csv.writer(file) if file else None
            if rows:
                rows.writerow((FILENAME_KEY, LABEL_KEY, "split"))
            for examples, splits in {lineage.examples: lineage.splits for lineage in chain if lineage.examples}.items():
                for split in splits:
                    files = sorted(tf.io.gfile.glob(f"{examples}/Split-{split}/*"))
                    if not files:
                        counts.setdefault(split)
                        continue
                    counts[split] = counts.get(split) or Counter()
                    for filename, label in _read_images(files):
                        counts[split][label] += 1
                        if rows:
                            rows.writerow((filename, label, split))
        if temporary:
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"Expected --images to be a file that can be written. Received: {path}: {error.strerror}.") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
    return counts


def _read_images(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each record's file name and label."""
    scalar = tf.io.FixedLenFeature([], tf.string)
    compression = "GZIP" if files[0].endswith(".gz") else ""
    for batch in tf.data.TFRecordDataset(files, compression_type=compression).batch(_NUM_PARSED):
        parsed = tf.io.parse_example(batch, {FILENAME_KEY: scalar, LABEL_KEY: scalar})
        for filename, label in zip(parsed[FILENAME_KEY].numpy(), parsed[LABEL_KEY].numpy(), strict=True):
            yield filename.decode("utf-8", "surrogateescape"), label.decode("utf-8", "surrogateescape")


def print_lineage(console: Console, chain: Sequence[Lineage], counts: Mapping[str, Counter | None]) -> None:
    """Prints what a model was made of, and how many images it saw.

    Args:
      console: of the terminal.
      chain: as `read_lineage` gives it.
      counts: as `write_images` gives them.
    """
    for lineage in chain:
        if lineage is not chain[0]:
            console.print(f"[bold]It started from model {lineage.model_id}[/]", highlight=False)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, value in _lines(lineage):
            table.add_row(name, escape(value))
        console.print(table)
    classes = sorted({name for count in counts.values() for name in count or ()})
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("images")
    for split, count in counts.items():
        table.add_column(split if count is not None else f"{split} (gone)", justify="right")
    for name in classes:
        table.add_row(escape(name), *("" if count is None else f"{count[name]:,}" for count in counts.values()))
    table.add_section()
    table.add_row("all", *("" if count is None else f"{count.total():,}" for count in counts.values()))
    console.print(table)


def _lines(lineage: Lineage) -> Iterator[tuple[str, str]]:
    trained = datetime.datetime.fromtimestamp(lineage.trained / 1000).strftime("%Y-%m-%d %H:%M")
    splits = f"on {', '.join(lineage.splits_trained)}, watched on {', '.join(lineage.splits_watched)}"
    yield "model", _place(lineage.model)
    yield "trained", f"{trained} {splits}; code {lineage.settings.get('code', 'unknown')}"
    for section, settings in lineage.settings.items():
        if isinstance(settings, dict):
            yield f"  {section}", " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
    yield "transform graph", f"{_place(lineage.transform_graph)}; code {lineage.preprocessing.get('code', 'unknown')}"
    yield "examples", _place(lineage.examples)
    yield "records", _place(lineage.records)
    for line in lineage.fingerprint.splitlines():
        yield "", line


def _place(path: str | None) -> str:
    """Returns a path, and says where there is nothing any more."""
    if not path:
        return "not on record"
    return path if tf.io.gfile.exists(path) else f"{path} (gone)"
