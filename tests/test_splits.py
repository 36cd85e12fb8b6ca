"""Splits by content, and images that look alike."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data.errors import InputError, validate
from data.inspection import HASH_SIDE, ImageLimits, inspect_image
from data.splits import (
    MAX_DIFFERENT_BITS,
    SplitConfig,
    _band,
    choose_group_split,
    choose_split,
    find_near_duplicates,
)

CONFIG = SplitConfig()


def looks(*encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
    images = [inspect_image(one, ImageLimits()) for one in encoded]
    columns = ([image.perceptual_hash for image in images], [image.thumbnail for image in images])
    return tuple(np.stack([np.frombuffer(one, np.uint8) for one in column]) for column in columns)


def groups(hashes: np.ndarray, thumbnails: np.ndarray) -> list[list[int]]:
    return [group.tolist() for group in find_near_duplicates(hashes, thumbnails)]


def test_find_near_duplicates_finds_a_photograph_saved_again(encode, photograph):
    with Image.open(photograph) as image:
        half = image.resize((256, 300), Image.Resampling.LANCZOS)
        upside_down = image.transpose(Image.Transpose.ROTATE_180)
        brighter = image.point(lambda value: min(255, round(value * 1.05 + 3)))
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    variants = [
        encode(noise[0]),
        photograph.read_bytes(),
        encode(upside_down),
        encode(half, "JPEG", quality=60),
        encode(noise[1]),
        encode(half.convert("L")),
        encode(brighter, "WEBP", quality=80),
    ]

    assert groups(*looks(*variants)) == [[1, 3, 5, 6]]


def test_find_near_duplicates_keeps_different_drawings_apart(make_images, tmp_path):
    folder = make_images(tmp_path / "shapes", num_per_class=50)

    assert groups(*looks(*(path.read_bytes() for path in sorted(folder.glob("*/*"))))) == []


def test_find_near_duplicates_tells_one_shade_from_another(encode):
    flat = [encode(np.full((30, 40, 3), shade, np.uint8)) for shade in (0, 128, 0, 255, 128)]

    assert groups(*looks(*flat)) == [[0, 2], [1, 4]]


@pytest.mark.parametrize(
    ("num_different", "is_found"), [(0, True), (MAX_DIFFERENT_BITS, True), (MAX_DIFFERENT_BITS + 1, False)]
)
def test_find_near_duplicates_finds_every_pair_within_the_limit(num_different, is_found):
    """Wherever the different bits lie, one of the bands is the same."""
    random = np.random.default_rng(num_different)
    thumbnail = random.integers(0, 256, 64, np.uint8)
    for _ in range(200):
        bits = random.integers(0, 2, HASH_SIDE**2).astype(np.uint8)
        other = bits.copy()
        other[random.choice(HASH_SIDE**2, num_different, replace=False)] ^= 1
        hashes = np.packbits(np.stack([bits, other]), axis=1)
        assert groups(hashes, np.stack([thumbnail, thumbnail])) == ([[0, 1]] if is_found else [])


def test_find_near_duplicates_wants_the_thumbnails_alike_too():
    random = np.random.default_rng(0)
    hashes = np.zeros((2, HASH_SIDE**2 // 8), np.uint8)

    assert groups(hashes, random.integers(0, 256, (2, 64), np.uint8)) == []


def test_find_near_duplicates_chains_pairs_into_a_group():
    thumbnail = np.arange(64, dtype=np.uint8)
    bits = np.zeros((4, HASH_SIDE**2), np.uint8)
    for row in range(4):
        bits[row, : 10 * row] = 1  # neighbours differ in 10 bits, the first and the last in 30

    assert groups(np.packbits(bits, axis=1), np.tile(thumbnail, (4, 1))) == [[0, 1, 2, 3]]


def test_find_near_duplicates_takes_none_and_one():
    for number in (0, 1):
        assert groups(np.zeros((number, 32), np.uint8), np.zeros((number, 64), np.uint8)) == []


def test_bands_cover_different_bits():
    bits = np.zeros((1, HASH_SIDE**2), np.uint8)
    values = set()
    for position in range(255):
        bits[:] = 0
        bits[0, position] = 1
        bands = [int(_band(np.packbits(bits, axis=1), band)[0]) for band in range(17)]
        assert sum(value > 0 for value in bands) == 1, position
        values.add(tuple(bands))
    assert len(values) == 255


def test_choose_group_split_goes_by_the_first_digest():
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]

    assert choose_group_split(digests, [None] * 40, CONFIG) == choose_split(min(digests), CONFIG)
    assert choose_group_split(digests[::-1], [None] * 40, CONFIG) == choose_split(min(digests), CONFIG)


@pytest.mark.parametrize(
    ("given", "expected"), [((None, "train"), "train"), (("valid", "train"), "valid"), (("train", "test", "valid"), "test")]
)
def test_choose_group_split_follows_what_the_user_gave(given, expected):
    assert choose_group_split(["0" * 64] * len(given), given, CONFIG) == expected


def test_split_config_leaves_images_to_train_on():
    with pytest.raises(InputError, match=r"as the rest is trained on. Received: 0.6 \+ 0.4"):
        validate(SplitConfig, {"valid_fraction": 0.6, "test_fraction": 0.4})
