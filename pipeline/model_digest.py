"""The identity of one exported model: a digest of its SavedModel's files.

A blessing is worth something only for the very model that earned it. The serving check writes this digest beside its
verdict, and deployment computes it again from the folder that it is about to push: one changed byte, one more or one
missing file, and the two differ. Where the folder lies and when it was written do not count, so the Trainer's
`Format-Serving` folder and the copy that Pusher makes of it have the same digest.
"""

import hashlib
import posixpath

import tensorflow as tf

from data.errors import InputError

# Read in pieces, so that memory does not grow with the size of the weights.
CHUNK_BYTES = 1 << 22


def model_digest(folder: str) -> str:
    """Computes the digest of a SavedModel's folder.

    Args:
      folder: of the SavedModel (it holds `saved_model.pb`); local or gs://.

    Returns:
      64 hexadecimal digits: the SHA-256 of, in the order of the paths, each file's path relative to the folder, its
      length in bytes and the SHA-256 of its contents.

    Raises:
      InputError: if the folder does not exist or holds no file.
    """
    folder = folder.rstrip("/")
    paths = sorted(_relative_paths(folder))
    if not paths:
        raise InputError(
            f"Expected a folder with a SavedModel's files. Received: {folder!r}, which does not exist or holds no file. Give"
            " the folder in which saved_model.pb lies."
        )
    digest = hashlib.sha256()
    for path in paths:
        content, length = hashlib.sha256(), 0
        with tf.io.gfile.GFile(posixpath.join(folder, path), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                content.update(chunk)
                length += len(chunk)
        # Lengths go in too, so that no two different folders feed the digest the same bytes.
        encoded_path = path.encode("utf-8")
        digest.update(len(encoded_path).to_bytes(8, "big") + encoded_path + length.to_bytes(8, "big") + content.digest())
    return digest.hexdigest()


def _relative_paths(folder: str) -> list[str]:
    """Lists the files below a folder as paths relative to it, with forward slashes on every system.

    Empty folders do not count: object stores have none, and a copy to one loses them.
    """
    paths = []
    for directory, _, files in tf.io.gfile.walk(folder):
        relative = directory.rstrip("/")[len(folder) :].strip("/")
        paths += [posixpath.join(relative, file) for file in files]
    return [path for path in paths if path]
