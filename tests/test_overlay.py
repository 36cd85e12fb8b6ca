import numpy as np
import pytest
from PIL import Image

from models.overlay import overlay


def test_overlay_colours_what_speaks_for_and_against_and_stretches_it():
    attribution = np.zeros((112, 112), np.float32)
    attribution[20:36, 20:36], attribution[76:92, 76:92] = 3e-4, -3e-4

    drawn = np.asarray(overlay(Image.new("RGB", (160, 80), (90, 90, 90)), attribution)).astype(int)

    assert drawn.shape == (80, 160, 3)
    red, _, blue = drawn[20, 40]
    assert red > blue + 90  # orange: up left, at a quarter of the height and of the width
    red, _, blue = drawn[60, 120]
    assert blue > red + 90
    np.testing.assert_array_equal(drawn[60, 30], (90, 90, 90))


def test_overlay_of_nothing_leaves_the_image_grey():
    drawn = overlay(Image.new("RGB", (9, 7), (255, 0, 0)), np.zeros((32, 32), np.float32))

    assert drawn.size == (9, 7)
    assert len(set(drawn.getpixel((4, 3)))) == 1


def test_overlay_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="Expected an attribution of finite values"):
        overlay(Image.new("RGB", (9, 7)), np.full((32, 32), np.nan, np.float32))
