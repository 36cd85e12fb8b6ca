import shutil
from pathlib import Path

import pytest
import tensorflow as tf

from data.errors import InputError
from pipeline.model_digest import model_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder shaped as a SavedModel."""
    folder = tmp_path / "model"
    for name, content in {
        "saved_model.pb": b"graph",
        "variables/variables.index": b"index",
        "variables/variables.data-00000-of-00001": b"weights",
        "assets.extra/labels.txt": b"circle\nsquare\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_model_digest_is_the_same_for_a_copy_elsewhere(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "deeper" / "1700000000")
    (copy / "assets").mkdir()  # an empty folder, which a bucket would lose

    digest = model_digest(str(model))

    assert len(bytes.fromhex(digest)) == 32
    assert model_digest(str(copy)) == model_digest(f"{model}/") == digest


def test_model_digest_is_the_same_on_another_file_system(model):
    folder = "ram://digest/model"
    for path in sorted(file for file in model.rglob("*") if file.is_file()):
        copy = f"{folder}/{path.relative_to(model).as_posix()}"
        tf.io.gfile.makedirs(copy.rpartition("/")[0])  # TensorFlow's ram:// lists no other folders
        tf.io.gfile.copy(str(path), copy, overwrite=True)

    assert model_digest(folder) == model_digest(str(model))


@pytest.mark.parametrize("change", ["content", "name", "one more", "one missing", "moved content"])
def test_model_digest_changes_with_every_change(model, change):
    before = model_digest(str(model))

    labels = model / "assets.extra" / "labels.txt"
    if change == "content":
        labels.write_bytes(b"square\ncircle\n")
    elif change == "name":
        labels.rename(labels.with_name("names.txt"))
    elif change == "one more":
        (model / "assets.extra" / "network.json").write_bytes(b"")
    elif change == "one missing":
        labels.unlink()
    else:  # the same bytes in the same order, divided otherwise between two files
        (model / "variables" / "variables.data-00000-of-00001").write_bytes(b"weightsi")
        (model / "variables" / "variables.index").write_bytes(b"ndex")

    assert model_digest(str(model)) != before


def test_model_digest_refuses_a_folder_without_files(tmp_path):
    with pytest.raises(InputError, match=r"Expected a folder with a SavedModel's files. Received: '.*nowhere'"):
        model_digest(str(tmp_path / "nowhere"))
