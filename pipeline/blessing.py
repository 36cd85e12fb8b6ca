"""Whether a model is blessed: the verdicts in a workspace's metadata store that belong to that very model.

A model is known by its content, `pipeline.model_digest`, not by where it lies: a copy keeps its blessings, an edited one loses
them. Called by `pipeline.deploy`, by `pipeline.history` and by whatever puts a model in place.
"""

import contextlib
import dataclasses
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_metadata as mlmd
import tensorflow as tf
from ml_metadata.proto import metadata_store_pb2
from tfx.components.evaluator import constants
from tfx.utils import path_utils

from data.errors import InputError
from data.inspection import is_remote
from pipeline.components import MODEL_DIGEST_KEY
from pipeline.model_digest import model_digest
from pipeline.versions import SAVED_MODEL_FILE

METADATA_FILE = Path("pipeline", "metadata.db")  # in a workspace

_BLESSED = constants.ARTIFACT_PROPERTY_BLESSED_KEY
_MODEL_ID = constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY
_BUSY_SECONDS = 30.0  # to wait for a run that is writing


@contextlib.contextmanager
def open_metadata(workspace: Path) -> Iterator[mlmd.MetadataStore]:
    """Opens a snapshot of a workspace's metadata store, so that a run in progress is not kept waiting and nothing is written.

    Args:
      workspace: of one pipeline.

    Raises:
      InputError: if there is no metadata store.
    """
    path = workspace / METADATA_FILE
    if not path.is_file():
        raise InputError(
            f"Expected a workspace, a folder with {METADATA_FILE}. Received: {str(workspace)!r}. Give --workspace the folder "
            "that local_runner.py wrote, runs/<pipeline name> by default."
        )
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder, path.name)
        config = metadata_store_pb2.ConnectionConfig()
        config.sqlite.filename_uri = str(snapshot)
        config.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READONLY
        try:
            _copy_database(path, snapshot)
            store = mlmd.MetadataStore(config)
        except (sqlite3.Error, RuntimeError) as error:
            raise InputError(
                f"Expected {path} to be the metadata store of a pipeline. Received: {str(error).strip().splitlines()[0]}. If a "
                "run has just begun, wait for its first component."
            ) from error
        yield store


def _copy_database(path: Path, snapshot: Path) -> None:
    """Copies a SQLite database as of its last transaction, also while another process writes to it."""
    uri = path.resolve().as_uri()
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as source,
            contextlib.closing(sqlite3.connect(snapshot)) as target,
        ):
            source.backup(target)
    except sqlite3.OperationalError:
        # A killed run left half a transaction, which only a writer may roll back: that is done in the copy.
        journal = path.with_name(f"{path.name}-journal")
        if not journal.exists():
            raise
        shutil.copy(path, snapshot)
        shutil.copy(journal, snapshot.with_name(journal.name))
        with contextlib.closing(sqlite3.connect(snapshot)) as target:
            target.execute("PRAGMA schema_version").fetchone()


def find_workspace(model: str, workspace: str | None) -> Path:
    """Returns the workspace that a model belongs to.

    Args:
      model: folder of the model, local or gs://.
      workspace: as the user gave it, or None to look for it in the folders above the model.

    Raises:
      InputError: if there is none above the model.
    """
    if workspace is not None:
        return Path(workspace).expanduser()
    if is_in_workspace(model):
        return next(folder for folder in _folders_above(model) if (folder / METADATA_FILE).is_file())
    raise InputError(
        f"Expected {model!r} to lie in a workspace, below a folder with {METADATA_FILE}. Received: none above it. "
        "Name the workspace that made the model with --workspace."
    )


def is_in_workspace(model: str) -> bool:
    """Says whether a model lies in the workspace of a local run."""
    return not is_remote(model) and any((folder / METADATA_FILE).is_file() for folder in _folders_above(model))


def _folders_above(model: str) -> Sequence[Path]:
    return Path(model).expanduser().resolve().parents


def saved_model_folder(folder: str) -> str:
    """Returns the SavedModel's folder: the given one, or the one that a Trainer wrote below it.

    Args:
      folder: a version of a serving folder, or the Trainer's `model` artifact; local or gs://.

    Raises:
      InputError: if there is no SavedModel.
    """
    folder = folder.rstrip("/") or "/"
    for candidate in (folder, path_utils.serving_model_path(folder)):
        if tf.io.gfile.exists(f"{candidate}/{SAVED_MODEL_FILE}"):
            return candidate
    raise InputError(
        f"Expected a SavedModel's folder, which holds {SAVED_MODEL_FILE}. Received: {folder!r}. "
        "Give serving_model/<version>, or the folder that the Trainer wrote."
    )


@dataclasses.dataclass(frozen=True)
class Blessing:
    """Both verdicts on one model, each the latest of its kind.

    Attributes:
      digest: of the model, as `model_digest` gives it.
      model_id: of the Model artifact.
      evaluation_id: of the ModelBlessing artifact, the Evaluator's.
      serving_check_id: of the InfraBlessing artifact, the serving check's.
    """

    digest: str
    model_id: int
    evaluation_id: int
    serving_check_id: int


def find_blessing(store: mlmd.MetadataStore, digest: str) -> Blessing | None:
    """Returns the blessing that belongs to the very model with a digest; None unless Evaluator and serving check both bless it.

    Where a model was judged several times, such as under other limits, the latest verdicts count; one that a later run reused
    counts as of that run.

    Args:
      store: the metadata store.
      digest: of the model, as `model_digest` gives it.
    """
    serving_check, evaluation = _verdicts(store, digest)
    if not (is_blessing(serving_check) and is_blessing(evaluation)):
        return None
    return Blessing(digest, model_id_of(serving_check), evaluation.id, serving_check.id)


def missing_blessing(store: mlmd.MetadataStore, digest: str) -> str:
    """Returns what a model lacks to be pushed and what to do, in one or two sentences; empty if it lacks nothing."""
    serving_check, evaluation = _verdicts(store, digest)
    if serving_check is None:
        model = find_model(store, digest)
        if model is None:
            return (
                "its files are those of no model that this workspace made: it was changed, or comes from elsewhere. "
                "Push the folder as the run left it, or name its own workspace with --workspace."
            )
        return (
            f"no serving check of it is on record, though model {model.id} is this very one. "
            "Run the pipeline again, which checks it."
        )
    if not is_blessing(serving_check):
        return "the serving check refused this very model. Its reasons are in run.json and the report; mend it and run again."
    if evaluation is None:
        return "the serving check blessed it, but there is no verdict of the Evaluator on it. Run the pipeline again."
    if not is_blessing(evaluation):
        return (
            "the serving check blessed it, but the Evaluator refused this very model. "
            "Its reasons are in run.json and the report; train a better one."
        )
    return ""


def is_blessing(artifact: metadata_store_pb2.Artifact | None) -> bool:
    """Tells whether a ModelBlessing or InfraBlessing blesses."""
    return artifact is not None and artifact.custom_properties[_BLESSED].int_value == constants.BLESSED_VALUE


def model_id_of(blessing: metadata_store_pb2.Artifact) -> int:
    """Returns the id of the Model artifact that a blessing, of either kind, is about."""
    return blessing.custom_properties[_MODEL_ID].int_value


def _verdicts(
    store: mlmd.MetadataStore, digest: str
) -> tuple[metadata_store_pb2.Artifact | None, metadata_store_pb2.Artifact | None]:
    """Returns the latest InfraBlessing of a digest and the latest ModelBlessing of the model that it is about."""
    checks = [
        artifact
        for artifact in store.get_artifacts_by_type("InfraBlessing")
        if artifact.custom_properties[MODEL_DIGEST_KEY].string_value == digest
    ]
    serving_check = _latest(store, checks)
    if serving_check is None:
        return None, None
    model_id = model_id_of(serving_check)
    evaluations = [artifact for artifact in store.get_artifacts_by_type("ModelBlessing") if model_id_of(artifact) == model_id]
    return serving_check, _latest(store, evaluations)


def _latest(store: mlmd.MetadataStore, artifacts: Sequence[metadata_store_pb2.Artifact]) -> metadata_store_pb2.Artifact | None:
    """Returns the artifact that was put out last, by a component that ran or by one that reused it; None without any."""
    put_out: dict[int, int] = {}
    for event in store.get_events_by_artifact_ids([artifact.id for artifact in artifacts]):
        if event.type == metadata_store_pb2.Event.OUTPUT:
            put_out[event.artifact_id] = max(event.execution_id, put_out.get(event.artifact_id, 0))
    published = [artifact for artifact in artifacts if artifact.id in put_out]
    return max(published, key=lambda artifact: put_out[artifact.id], default=None)


def find_model(store: mlmd.MetadataStore, digest: str) -> metadata_store_pb2.Artifact | None:
    """Returns the Model artifact whose SavedModel has a digest, or None.

    The serving check's record says so. The files themselves do for models that were never checked only, as those of a checked
    one may have been edited in their place since.

    Args:
      store: the metadata store.
      digest: as `model_digest` gives it.
    """
    models = {artifact.id: artifact for artifact in store.get_artifacts_by_type("Model")}
    for check in store.get_artifacts_by_type("InfraBlessing"):
        if recorded := check.custom_properties[MODEL_DIGEST_KEY].string_value:
            model = models.pop(model_id_of(check), None)
            if model is not None and recorded == digest:
                return model
    for _, model in sorted(models.items(), reverse=True):
        folder = path_utils.serving_model_path(model.uri)
        if tf.io.gfile.exists(f"{folder}/{SAVED_MODEL_FILE}") and model_digest(folder) == digest:
            return model
    return None
