"""Runs the trainer in a process of its own, as a test of several devices or of a kill needs one.

    python tests/training_process.py ARGUMENTS.json

ARGUMENTS.json holds what TFX would pass to `run_fn`, and `num_devices`, the virtual CPU devices to make.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import logging

import tensorflow as tf

from models.trainer import run_fn

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    arguments = json.loads(Path(sys.argv[1]).read_text())
    devices = [tf.config.LogicalDeviceConfiguration()] * arguments.pop("num_devices")
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    run_fn(SimpleNamespace(**arguments))
