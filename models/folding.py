"""Folds BatchNormalization into the convolutions before it: the same function at inference, in fewer operations.

A convolution with a bias and its activation is one kernel on a CPU, where a BatchNormalization in between is a pass over the
feature map of its own. For any functional Keras model, in pure Keras. Called by `models.classifier` on the frozen half.

Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", section
3.2, https://arxiv.org/abs/1712.05877
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

_CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)


def fold_batch_norm(network: keras.Model) -> keras.Model:
    """Makes a copy of a network in which each BatchNormalization right after a convolution is folded into that convolution.

    One is folded where it alone reads what a Conv2D or DepthwiseConv2D without an activation writes; any other stays as it is.
    For inference only: a folded network has no statistics of a batch left to learn.

    Args:
      network: a functional model; it isn't changed.

    Returns:
      A model with weights of its own, the same names of layers and, at inference, the same outputs up to rounding; the
      network itself, if there is nothing to fold.
    """
    convolution_of = _find_foldable(network)
    if not convolution_of:
        return network
    convolutions = set(convolution_of.values())

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # an operation of `keras.ops`, which has no state
        config = layer.get_config()
        if layer.name in convolutions:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        return args[0] if layer.name in convolution_of else layer(*args, **kwargs)

    folded = keras.models.clone_model(network, clone_function=clone, call_function=call)
    for layer in folded.layers:
        if layer.name not in convolutions and layer.weights:
            layer.set_weights(network.get_layer(layer.name).get_weights())
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with constants that it makes of its weights here
    for batch_norm, convolution in convolution_of.items():
        weights = _fold(network.get_layer(convolution), network.get_layer(batch_norm))
        folded.get_layer(convolution).set_weights(weights)
    if not network.trainable:
        folded.trainable = False
    return folded


def _find_foldable(network: keras.Model) -> dict[str, str]:
    """Returns the name of each BatchNormalization that can be folded -> the name of the convolution before it."""
    # Asked first, as a layer without a configuration, such as one around a SavedModel, may be in a network with none of them.
    if not any(isinstance(layer, keras.layers.BatchNormalization) for layer in network.layers):
        return {}
    config = network.get_config()
    outputs = {name for name in keras.tree.flatten(config["output_layers"]) if isinstance(name, str)}
    calls = {entry["name"]: entry["inbound_nodes"] for entry in config["layers"]}
    readers: dict[str, list[str]] = {}
    for reader, nodes in calls.items():
        for name in _inputs(nodes):
            readers.setdefault(name, []).append(reader)
    layers = {layer.name: layer for layer in network.layers}
    found = {}
    for name, layer in layers.items():
        # A layer that is called more than once is shared, and what follows one call need not follow the other.
        if type(layer) not in _CONVOLUTIONS or name in outputs or len(calls[name]) != 1 or len(readers.get(name, [])) != 1:
            continue
        reader = readers[name][0]
        batch_norm = layers.get(reader)  # none for an operation of `keras.ops`
        if (
            type(batch_norm) is keras.layers.BatchNormalization
            and len(calls[reader]) == 1
            and layer.activation is keras.activations.linear
            and batch_norm.axis % 4 == (3 if layer.data_format == "channels_last" else 1)
        ):
            found[reader] = name
    return found


def _inputs(node: Any) -> Iterator[str]:
    """Yields the name of the layer behind each tensor in a configuration's `inbound_nodes`."""
    if isinstance(node, dict):
        if "keras_history" in node:
            yield node["keras_history"][0]
        else:
            for value in node.values():
                yield from _inputs(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _inputs(value)


def _fold(convolution: keras.layers.Layer, batch_norm: keras.layers.BatchNormalization) -> list[np.ndarray]:
    """Returns the folded kernel and bias: gamma * (kernel * x + bias - mean) / sqrt(variance + epsilon) + beta."""
    kernel, *bias = (np.asarray(weight, np.float64) for weight in convolution.get_weights())
    statistics = iter(np.asarray(weight, np.float64) for weight in batch_norm.get_weights())
    gamma = next(statistics) if batch_norm.scale else 1.0
    beta = next(statistics) if batch_norm.center else 0.0
    mean, variance = statistics
    scale = gamma / np.sqrt(variance + batch_norm.epsilon)
    # A depthwise kernel is [height, width, channels, multiplier], with the multiplier's outputs of a channel in a row.
    is_depthwise = isinstance(convolution, keras.layers.DepthwiseConv2D)
    kernel_scale = scale.reshape(kernel.shape[2:]) if is_depthwise else scale
    return [kernel * kernel_scale, beta + ((bias[0] if bias else 0.0) - mean) * scale]


def unfold_batch_norm(folded: keras.Model, network: keras.Model) -> None:
    """Sets a network's weights so that it computes what a folded copy of it does; the reverse of `fold_batch_norm`.

    What the convolutions have taken in stays there, and each BatchNormalization adds the bias alone.

    Args:
      folded: of `fold_batch_norm(network)`, with any weights.
      network: the functional model that it is a copy of; its weights are set.
    """
    convolution_of = _find_foldable(network)
    for layer in folded.layers:
        if layer.weights and layer.name not in convolution_of.values():
            network.get_layer(layer.name).set_weights(layer.get_weights())
    for batch_norm_name, convolution in convolution_of.items():
        kernel, bias = folded.get_layer(convolution).get_weights()
        batch_norm = network.get_layer(batch_norm_name)
        network.get_layer(convolution).set_weights([kernel])
        ones, zeros = np.ones_like(bias), np.zeros_like(bias)
        learned = [*([ones] if batch_norm.scale else []), *([bias] if batch_norm.center else [])]
        batch_norm.set_weights([*learned, zeros if batch_norm.center else -bias, ones - batch_norm.epsilon])
