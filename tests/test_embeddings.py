import os

import keras
import numpy as np
import pytest
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from models import embeddings as module
from models.classifier import ModelConfig, build_statistics, fit_projection
from models.embeddings import (
    EmbeddingsFolder,
    compute_statistics,
    embed,
    embeddings_key,
    find_images,
    read_images,
)
from preprocessing.transform import TransformGraph


@pytest.fixture(scope="module")
def transform(transform_graph) -> TransformGraph:
    return TransformGraph(transform_graph)


@pytest.fixture(scope="module")
def statistics() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_statistics(ModelConfig(weights="random", num_feature_maps=1), image_size=TRANSFORM_IMAGE_SIZE)


@pytest.fixture(scope="module")
def colours() -> tuple[list[np.ndarray], list[str]]:
    """Forty images of 32 pixels whose classes are dark and bright noise."""
    random = np.random.default_rng(0)
    bounds = [(0, 90) if number % 2 else (150, 256) for number in range(40)]
    return (
        [random.integers(*limits, (32, 32, 3), np.uint8) for limits in bounds],
        [CLASS_NAMES[number % 2] for number in range(40)],
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory, write_records, colours) -> list[str]:
    """Two files of records; the second one is short."""
    folder = tmp_path_factory.mktemp("records")
    images, labels = colours
    write_records(folder / "train-00001-of-00002.tfrecord.gz", images[35:], labels[35:])
    write_records(folder / "train-00000-of-00002.tfrecord.gz", images[:35], labels[:35])
    return [str(folder / "train-*.gz")]


@pytest.fixture
def embedded_images(monkeypatch):
    """The number of images that run through the network from here on."""
    counted = []

    def count(*arguments, **options):
        for batch, labels in compute_statistics(*arguments, **options):
            counted.extend(labels)
            yield batch, labels

    monkeypatch.setattr(module, "compute_statistics", count)
    return counted


def test_find_images_counts_the_records_and_knows_them_again(records, tmp_path, write_records, colours):
    images = find_images(records, split="train")

    assert images.num_images == 40
    assert [os.path.basename(path) for path in images.files] == [
        "train-00000-of-00002.tfrecord.gz",
        "train-00001-of-00002.tfrecord.gz",
    ]
    assert find_images(records, split="train") == images
    other = write_records(tmp_path / "other.gz", colours[0], colours[1][::-1])
    assert find_images([other], split="train").fingerprint != images.fingerprint


def test_find_images_refuses_files_without_images(tmp_path, write_records):
    path = write_records(tmp_path / "records.gz", [], [])

    with pytest.raises(ValueError, match=f"^Expected images in {path}. Received: none.$"):
        find_images([path], split="train")


def test_read_images_gives_the_records_in_their_order(transform, records, colours):
    batches = list(read_images(transform, find_images(records, split="train")))

    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_allclose(images, np.stack(colours[0]), atol=1e-3)
    np.testing.assert_array_equal(labels, [number % 2 for number in range(40)])


def test_compute_statistics_gives_a_row_for_every_image(statistics, transform, records, colours):
    batches = list(compute_statistics(statistics, transform, find_images(records, split="train")))

    rows = np.concatenate([rows for rows, _ in batches])
    expected = np.asarray(statistics([np.stack(colours[0]).astype(np.float32)], training=False))
    assert len(batches) > 1
    # Squared, as a square root makes much of a difference between values near zero.
    np.testing.assert_allclose(np.square(rows), np.square(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.arange(40) % 2)


def test_compute_statistics_refuses_a_label_that_is_not_in_the_list(tmp_path, statistics, transform, write_records, colours):
    path = write_records(tmp_path / "records.gz", colours[0][:2], ["circle", "triangle"])

    with pytest.raises(ValueError, match=r"^Expected labels of labels.txt only. Received: a record with another one"):
        list(compute_statistics(statistics, transform, find_images([path], split="train")))


def test_read_images_passes_over_records_at_the_start(transform, records, colours):
    batches = list(read_images(transform, find_images(records, split="train"), skip=33))

    np.testing.assert_allclose(np.concatenate([images for images, _ in batches]), np.stack(colours[0][33:]), atol=1e-3)


def test_embed_keeps_the_projected_statistics_on_disk(tmp_path, statistics, transform, records, colours):
    images = find_images(records, split="train")

    projection, train, valid = embed(
        statistics, transform, images, images_of(images, "valid"), num_components=4, folder=str(tmp_path)
    )

    expected = np.asarray(statistics([np.stack(colours[0]).astype(np.float32)], training=False))
    for found in (train, valid):
        assert isinstance(found.features, np.memmap)
        np.testing.assert_allclose(found.features, projection(expected), atol=1e-2)
        np.testing.assert_array_equal(found.labels, np.arange(40) % 2)
    assert (tmp_path / "train.features").stat().st_size == 40 * 4 * 4
    np.testing.assert_allclose(projection.kernel, fit_projection(expected, num_components=4).kernel, rtol=0.1, atol=1e-2)


def images_of(images, split):
    return module.dataclasses.replace(images, split=split)


def test_embed_reuses_what_is_there(tmp_path, statistics, transform, records, embedded_images):
    images = find_images(records, split="train")
    arguments = (statistics, transform, images, images_of(images, "valid"))
    projection, train, _ = embed(*arguments, num_components=4, folder=str(tmp_path))
    first = np.array(train.features)
    del embedded_images[:]

    again, train, _ = embed(*arguments, num_components=4, folder=str(tmp_path))

    assert embedded_images == []
    np.testing.assert_array_equal(again.kernel, projection.kernel)
    np.testing.assert_array_equal(train.features, first)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_embed_goes_on_where_it_was_killed(tmp_path, statistics, transform, records, embedded_images, split):
    images = find_images(records, split="train")
    arguments = (statistics, transform, images, images_of(images, "valid"))
    _, *whole = embed(*arguments, num_components=4, folder=str(tmp_path))
    whole = [np.array(found.features) for found in whole]
    # As a kill leaves them: one file has a torn row, the other is further.
    os.truncate(tmp_path / f"{split}.features", 32 * 4 * 4 + 5)
    os.truncate(tmp_path / f"{split}.labels", 33 * 8)
    if split == "train":
        os.remove(tmp_path / "valid.features")
    del embedded_images[:]

    _, *found = embed(*arguments, num_components=4, folder=str(tmp_path))

    assert len(embedded_images) == 8 + (40 if split == "train" else 0)
    for embeddings, features in zip(found, whole, strict=True):
        np.testing.assert_allclose(embeddings.features, features, atol=1e-3)
        np.testing.assert_array_equal(embeddings.labels, np.arange(40) % 2)


def test_embed_takes_a_projection_that_is_given(tmp_path, statistics, transform, records, colours):
    images = find_images(records, split="train")
    rows = np.asarray(statistics([np.stack(colours[0][:20]).astype(np.float32)], training=False))
    projection = fit_projection(rows, num_components=3)

    found, train, _ = embed(
        statistics, transform, images, images_of(images, "valid"), num_components=9, folder=str(tmp_path), projection=projection
    )

    assert found is projection
    assert train.features.shape == (40, 3)


def test_embed_takes_no_rows_of_another_projection(tmp_path, statistics, transform, records, embedded_images):
    images = find_images(records, split="train")
    arguments = (statistics, transform, images, images_of(images, "valid"))
    _, *whole = embed(*arguments, num_components=4, folder=str(tmp_path))
    whole = [np.array(found.features) for found in whole]
    # As an upload that was cut off leaves a cache.
    os.remove(tmp_path / "projection.npz")
    np.full(40 * 4, 7.0, np.float32).tofile(tmp_path / "train.features")
    del embedded_images[:]

    _, *found = embed(*arguments, num_components=4, folder=str(tmp_path))

    assert len(embedded_images) == 80
    for embeddings, features in zip(found, whole, strict=True):
        np.testing.assert_allclose(embeddings.features, features, atol=1e-3)


def test_embeddings_key_changes_with_weights_images_and_settings(records):
    images = find_images(records, split="train")
    other_images = module.dataclasses.replace(images, fingerprint="0")
    weights = [np.zeros(3), np.ones(2)]

    keys = [
        embeddings_key(weights, [images, images], settings={"input": 1}),
        embeddings_key(weights, [images, other_images], settings={"input": 1}),
        embeddings_key([np.zeros(3), np.zeros(2)], [images, images], settings={"input": 1}),
        embeddings_key(weights, [images, images], settings={"input": 2}),
    ]

    assert len(set(keys)) == 4
    assert embeddings_key(weights, [images, images], settings={"input": 1}) == keys[0]


def test_embeddings_key_is_the_same_for_a_network_built_twice(records):
    # Keras numbers layers without a name of their own anew each time.
    images = find_images(records, split="train")
    config = ModelConfig(backbone="efficientnet_b0", weights="random", num_feature_maps=1, covariance=False)
    keys = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        keys.append(embeddings_key(build_statistics(config, image_size=32).get_weights(), [images], settings={}))

    assert keys[0] == keys[1]


def test_embeddings_folder_outlives_the_run_in_a_cache(tmp_path):
    with EmbeddingsFolder(str(tmp_path / "cache"), "key") as folder:
        os.makedirs(folder)

    assert folder == str(tmp_path / "cache" / "key")
    assert os.path.isdir(folder)


def test_embeddings_folder_goes_without_a_cache():
    with EmbeddingsFolder("", "key") as folder:
        assert os.path.isdir(folder)

    assert not os.path.exists(folder)


def test_embeddings_folder_forgets_the_ones_used_longest_ago(tmp_path):
    for number in range(10):
        with EmbeddingsFolder(str(tmp_path), f"key{number}") as folder:
            os.makedirs(folder)
        os.utime(folder, (number, number))

    assert sorted(os.listdir(tmp_path)) == [f"key{number}" for number in range(2, 10)]


def test_embeddings_folder_of_a_remote_cache_is_local_meanwhile(tmp_path):
    # A file:// URL takes the road of a bucket.
    cache = f"file://{tmp_path}/cache"
    with EmbeddingsFolder(cache, "key") as folder:
        assert "://" not in folder
        for name in ("projection.npz", "train.features"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(name)
    assert not os.path.exists(folder)

    with EmbeddingsFolder(cache, "key") as folder:
        assert sorted(os.listdir(folder)) == ["projection.npz", "train.features"]
        with open(os.path.join(folder, "train.features")) as file:
            assert file.read() == "train.features"
