"""The backbones by name, each with what it needs of its input, its licence and its paper.

Preprocessing and export derive from this data, so training and serving cannot drift apart. Called by
`models.classifier`.
"""

import dataclasses
from collections.abc import Callable

import keras

from models.efficientnet_lite import efficientnet_lite0, load_imagenet_weights


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network that turns an image into feature maps.

    Attributes:
      build: makes the network without trained weights; takes `image_size` and `fold_batch_norm`, returns a model from
        float32 [batch, image_size, image_size, 3] in [0, 255] to a list of feature maps, coarsest last.
      load_imagenet: sets the ImageNet weights on such a network.
      covariance_maps: positions in that list of the maps whose channel covariances help; middle ones, of texture.
      image_size: side in pixels of the images it was trained on.
      licence: of the weights.
      paper: where it is described.
    """

    build: Callable[..., keras.Model]
    load_imagenet: Callable[[keras.Model], None]
    covariance_maps: tuple[int, ...]
    image_size: int
    licence: str
    paper: str


BACKBONES = {
    "efficientnet_lite0": Backbone(
        build=efficientnet_lite0,
        load_imagenet=load_imagenet_weights,
        covariance_maps=(3, 4),
        image_size=224,
        licence="Apache-2.0",
        paper="https://arxiv.org/abs/1905.11946",
    ),
}
