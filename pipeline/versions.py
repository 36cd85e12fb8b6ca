"""A serving folder, with a folder for each version of a model: the highest number is what servers load.

Called by `pipeline.deploy`, `pipeline.history` and whatever puts a model in place.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator

import tensorflow as tf

from data.errors import InputError
from data.inspection import is_remote
from pipeline.model_digest import model_digest

SAVED_MODEL_FILE = "saved_model.pb"
_UNFINISHED_SUFFIX = ".pushing"  # no version number, so a server does not look at it


def latest_version(folder: str) -> str | None:
    """Returns the name of the version that servers load, a number; None where there is none.

    Args:
      folder: of the versions; local or gs://; it need not exist.
    """
    complete = [name for name in _versions(folder) if tf.io.gfile.exists(f"{folder}/{name}/{SAVED_MODEL_FILE}")]
    return max(complete, key=int, default=None)


def _versions(folder: str) -> list[str]:
    if not tf.io.gfile.isdir(folder):
        return []
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return [name for name in names if name.isascii() and name.isdecimal()]


def push_model(model: str, destination: str, *, digest: str) -> str:
    """Copies a SavedModel into a serving folder as its next version; whole, or not at all.

    It is copied beside the versions first and compared with the digest there, so that a model that changes meanwhile, or a
    copy that fails, never comes into use.

    Args:
      model: folder of the SavedModel; local or gs://.
      destination: serving folder, made if missing; local or gs://.
      digest: of the model that was found to be blessed, as `model_digest` gives it.

    Returns:
      The folder of the new version. Its number is the time in seconds, or one more than the highest one there.

    Raises:
      InputError: if the serving folder cannot be made.
      RuntimeError: if the copy is not that model.
    """
    bucket = "/".join(destination.split("/")[:3])
    if destination.startswith("gs://") and not tf.io.gfile.isdir(bucket):  # to write into it TensorFlow would ask for ever
        raise InputError(
            f"Expected the bucket of {destination!r} to exist. Received: no {bucket}. Make it, name another, or, if it "
            "exists, ask for roles/storage.legacyBucketReader on it."
        )
    try:
        tf.io.gfile.makedirs(destination)
    except tf.errors.OpError as error:
        raise InputError(
            f"Expected {destination!r} to be a folder, or a place for one. Received: {error.message}. Give another folder."
        ) from error
    temporary = f"{destination}/{uuid.uuid4().hex}{_UNFINISHED_SUFFIX}"
    with _alone_in(destination):
        version = None
        try:
            for path in _files(model):
                target = f"{temporary}/{path}"
                tf.io.gfile.makedirs(os.path.dirname(target))
                tf.io.gfile.copy(f"{model}/{path}", target)
            if model_digest(temporary) != digest:
                raise RuntimeError(
                    f"Expected {model} to stay as it was while it was copied. Received: other files. Push it again."
                )
            version = f"{destination}/{_next_version(destination)}"
            if is_remote(destination):
                _move_files(temporary, version)
            else:
                os.rename(temporary, version)
        except BaseException:
            if version and is_remote(version) and tf.io.gfile.exists(version):
                tf.io.gfile.rmtree(version)
            raise
        finally:
            if tf.io.gfile.exists(temporary):
                tf.io.gfile.rmtree(temporary)
    return version


def _files(folder: str) -> list[str]:
    """Returns the paths of a SavedModel's files, `saved_model.pb` last, by which a model is known to be there."""
    paths = [
        os.path.join(parent.rstrip("/")[len(folder) :].strip("/"), name)
        for parent, _, names in tf.io.gfile.walk(folder)
        for name in names
    ]
    return sorted((path for path in paths if path), key=lambda path: (path == SAVED_MODEL_FILE, path))


def _move_files(source: str, target: str) -> None:
    """Moves a model in a bucket, object by object, as a bucket has no folders to rename."""
    for path in _files(source):
        tf.io.gfile.makedirs(os.path.dirname(f"{target}/{path}"))
        tf.io.gfile.rename(f"{source}/{path}", f"{target}/{path}")


def _next_version(destination: str) -> int:
    return max([int(time.time()), *(int(name) + 1 for name in _versions(destination))])


@contextlib.contextmanager
def _alone_in(destination: str) -> Iterator[None]:
    """Keeps another push on this machine out of a folder, and removes what a killed one left in it."""
    if is_remote(destination):
        yield
        return
    folder = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # waits
        for name in tf.io.gfile.listdir(destination):
            if name.endswith(_UNFINISHED_SUFFIX):
                tf.io.gfile.rmtree(f"{destination}/{name}")
        yield
    finally:
        os.close(folder)
