"""Decides the split of an image by its content, and keeps images that look alike in one split.

A model that is tested on what it was trained on looks better than it is. A hash of the bytes keeps exact duplicates together;
the same photograph at another size or quality has other bytes, so images that look alike are found by their perceptual hash
and brought into one split. Called by `data.steps`.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pydantic
from scipy import sparse
from scipy.sparse import csgraph

from data.features import TEST_SPLIT, TRAIN_SPLIT, VALID_SPLIT
from data.inspection import HASH_SIDE

# Two images look alike if at most 16 of the 256 bits of their perceptual hashes differ and their thumbnails correlate by 0.99.
# The pairs looked at, 4 among 2,569 flowers and 12 among 2,624 solar cells, show the same motif.
MAX_DIFFERENT_BITS = 16
MIN_CORRELATION = 0.99
# Of 17 bands at least one agrees where at most 16 bits differ, so that only images that share a band are compared.
_NUM_BANDS = MAX_DIFFERENT_BITS + 1
_BAND_BITS = HASH_SIDE**2 // _NUM_BANDS
_MAX_NEIGHBOURS = 30  # in a band that thousands share, such as black frames, each is compared with so many after it


class SplitConfig(pydantic.BaseModel):
    """How the images are divided.

    Attributes:
      valid_fraction: share of the images that early stopping watches, in (0, 1).
      test_fraction: share of the images that the gate judges by, in (0, 1).
      split_salt: any text; another one draws another split.
      join_near_duplicates: bring images that look alike into one split.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    valid_fraction: float = pydantic.Field(0.1, gt=0, lt=1)
    test_fraction: float = pydantic.Field(0.1, gt=0, lt=1)
    split_salt: str = ""
    join_near_duplicates: bool = True

    @pydantic.model_validator(mode="after")
    def _leave_images_to_train_on(self) -> "SplitConfig":
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                "Expected `valid_fraction` + `test_fraction` to be below 1, as the rest is trained on. Received: "
                f"{self.valid_fraction} + {self.test_fraction}. Take the defaults, 0.1 and 0.1."
            )
        return self


def choose_split(digest: str, config: SplitConfig) -> str:
    """Chooses the split of an image by the SHA-256 digest of its encoded bytes.

    Args:
      digest: hexadecimal digest.
      config: fractions and salt.
    """
    if config.split_salt:
        digest = hashlib.sha256(f"{config.split_salt}{digest}".encode()).hexdigest()
    position = int(digest[:8], 16) / 16**8
    if position < config.test_fraction:
        return TEST_SPLIT
    if position < config.test_fraction + config.valid_fraction:
        return VALID_SPLIT
    return TRAIN_SPLIT


def choose_group_split(digests: Sequence[str], given: Sequence[str | None], config: SplitConfig) -> str:
    """Chooses the split of images that look alike: the one that the user gave to some, else that of the first digest.

    Args:
      digests: of the group.
      given: split of each where the user decided, None elsewhere.
      config: fractions and salt.
    """
    for split in (TEST_SPLIT, VALID_SPLIT, TRAIN_SPLIT):
        if split in given:
            return split
    return choose_split(min(digests), config)


def find_near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray) -> list[np.ndarray]:
    """Groups images that look alike.

    Args:
      hashes: uint8 [images, HASH_SIDE ** 2 / 8]; packed perceptual hashes.
      thumbnails: uint8 [images, pixels]; grey values.

    Returns:
      The groups of two and more, each int [members], ascending; in the order of their first members.

    Source: perceptual hash, https://www.phash.org; candidates by bands, Leskovec et al., Mining of Massive Datasets, chapter 3
    """
    num_images = len(hashes)
    links = [
        pairs[_look_alike(pairs, hashes, thumbnails)]
        for band in range(_NUM_BANDS)
        for pairs in _pairs_that_share(_band(hashes, band))
    ]
    left, right = np.concatenate(links).T if links else np.zeros((2, 0), int)
    graph = sparse.coo_matrix((np.ones(len(left), bool), (left, right)), shape=(num_images, num_images))
    _, component = csgraph.connected_components(graph, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1) if num_images else []
    return sorted((group for group in groups if len(group) > 1), key=lambda group: group[0])


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    """Returns the value of one band of every hash, int [images]."""
    first = band * _BAND_BITS
    whole_bytes = hashes[:, first // 8 : (first + _BAND_BITS - 1) // 8 + 1]
    bits = np.unpackbits(whole_bytes, axis=1)[:, first % 8 : first % 8 + _BAND_BITS]
    return bits @ (1 << np.arange(_BAND_BITS))


def _pairs_that_share(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields int [pairs, 2] of images with the same value, a distance in the sorted order at a time."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    for distance in range(1, min(_MAX_NEIGHBOURS, len(order) - 1) + 1):
        same = np.flatnonzero(ranked[distance:] == ranked[:-distance])
        if not len(same):
            return
        yield np.stack([order[same], order[same + distance]], axis=1)


def _look_alike(pairs: np.ndarray, hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Tells which pairs are near-duplicates, bool [pairs]."""
    left, right = pairs.T
    num_different = np.unpackbits(hashes[left] ^ hashes[right], axis=1).sum(axis=1)
    is_near = num_different <= MAX_DIFFERENT_BITS
    candidates = np.flatnonzero(is_near)
    one, other = thumbnails[left[candidates]], thumbnails[right[candidates]]
    correlation = (_standardize(one) * _standardize(other)).sum(axis=1)
    # Images of one shade each have no correlation; they look alike where the shade is the same.
    is_flat = (np.ptp(one, axis=1) == 0) & (np.ptp(other, axis=1) == 0)
    is_near[candidates] = np.where(is_flat, one[:, 0] == other[:, 0], correlation >= MIN_CORRELATION)
    return is_near


def _standardize(thumbnails: np.ndarray) -> np.ndarray:
    """Returns float32 [images, pixels] of mean zero and norm one; zeros where an image has one shade only."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
