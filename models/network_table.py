"""The table of a network for the log: a row for each block, with its size and its cost. Pure Keras.

`keras.Model.summary` takes a line for each of some 200 layers and does not say what they cost. Called by the trainer and the
fine-tuning.
"""

import math
import re
from collections.abc import Iterator

import keras

_MILLION = 1e6
# `block3` of `block3_expand_conv`, `feature_map3` of `feature_map3_pool`.
_NUMBERED = re.compile(r"(.*?\d[a-z]?)_.*[a-z]")
_BLOCK = re.compile(r"block\d+")
_NOTE = (
    "One multiplication with its addition counts as one multiply-add (two FLOPs), for one image. Counted are convolutions and\n"
    "dense layers; all else (pooling, normalization, activations, covariances) counts as zero."
)


def describe_network(network: keras.Model) -> str:
    """Describes a network as a table in plain text.

    Layers whose names begin alike (`block3_expand_conv`, `block3_project_conv`) share a row; a network inside the network is
    one row, or, where it has blocks of its own, its rows.

    Args:
      network: a functional or sequential network with an input of a fixed size.

    Returns:
      Lines of at most 100 characters: a header, for each group its name, the output shape of its last layer without the batch,
      its parameters, those of them that training changes, and its multiply-adds in millions; a total, and what was counted.

    Raises:
      ValueError: if the size of a layer's output is not fixed.
    """
    rows = []
    for name, layers in _group(network).items():
        madds = sum(_count_layer(layer) for layer in layers)
        rows.append((name, _shape(layers[-1]), *_count_parameters(layers), madds))
    # Not the sum of the rows, so that a weight that two layers share counts once.
    total = ("total", "", *_count_parameters([network]), sum(row[-1] for row in rows))
    cells = [("layers", "output", "parameters", "trainable", "M multiply-adds")]
    cells += [
        (name, shape, f"{parameters:,}", f"{trainable:,}", f"{madds / _MILLION:,.2f}")
        for name, shape, parameters, trainable, madds in [*rows, total]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        aligned[0] = row[0].ljust(widths[0])
        lines.append("  ".join(aligned))
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], _NOTE])


def count_multiply_adds(network: keras.Model) -> int:
    """Counts the multiply-adds of a network's convolutions and dense layers for one image.

    A layer that the network uses more than once counts once.

    Args:
      network: as for `describe_network`.

    Raises:
      ValueError: as `describe_network`.
    """
    return sum(_count_layer(layer) for layer in network.layers)


def _group(network: keras.Model) -> dict[str, list[keras.layers.Layer]]:
    """Groups the layers by the beginning of their names, in the order of the first of each group."""
    groups: dict[str, list[keras.layers.Layer]] = {}
    for layer, name in _expand(network):
        groups.setdefault(name, []).append(layer)
    # A name that stands for one layer is that layer's own.
    return {layers[0].name if len(layers) == 1 and not name.endswith(")") else name: layers for name, layers in groups.items()}


def _expand(network: keras.Model) -> Iterator[tuple[keras.layers.Layer, str]]:
    for layer in network.layers:
        if not isinstance(layer, keras.Model):
            match = _NUMBERED.fullmatch(layer.name)
            is_numbered_by_keras = re.fullmatch(r".*_\d+", layer.name)
            yield layer, match[1] if match else layer.name if is_numbered_by_keras else layer.name.split("_")[0]
        elif any(_BLOCK.match(inner.name) for inner in layer.layers):
            yield from _expand(layer)
        else:
            yield layer, f"{layer.name} (network)"  # apart from a group of layers of that name


def _shape(layer: keras.layers.Layer) -> str:
    return " x ".join(str(size) for size in _output_shape(layer)[1:])


def _count_parameters(layers: list[keras.layers.Layer]) -> tuple[int, int]:
    weights = {id(weight): weight for layer in layers for weight in layer.weights}
    trainable = {id(weight) for layer in layers for weight in layer.trainable_weights}
    sizes = {key: math.prod(weight.shape) for key, weight in weights.items()}
    return sum(sizes.values()), sum(size for key, size in sizes.items() if key in trainable)


def _count_layer(layer: keras.layers.Layer) -> int:
    """Counts the multiply-adds of one layer, or of a network inside the network, for one image."""
    if isinstance(layer, keras.Model):
        return count_multiply_adds(layer)
    if isinstance(layer, keras.layers.Dense):
        return math.prod(_output_shape(layer)[1:]) * layer.kernel.shape[0]
    is_depthwise = isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D)
    if is_depthwise or isinstance(layer, keras.layers.Conv1D | keras.layers.Conv2D | keras.layers.Conv3D):
        output = _output_shape(layer)
        positions = output[1:-1] if layer.data_format == "channels_last" else output[2:]
        # All of a kernel meets each position once: [*size, channels of a group, filters].
        return math.prod(positions) * math.prod(layer.kernel.shape)
    return 0


def _output_shape(layer: keras.layers.Layer) -> tuple[int, ...]:
    tensor = layer.output
    shape = tuple(tensor[-1].shape if isinstance(tensor, list | tuple) else tensor.shape)
    if None in shape[1:]:
        raise ValueError(
            f"Expected a network with an input of a fixed size. Received: layer {layer.name} with output shape {shape}. "
            "Build it with `image_size`."
        )
    return shape
