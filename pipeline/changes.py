"""What differs between two runs, in words: settings by their names, data, code.

Read from what the metadata store recorded of every component, so that it holds also for runs whose configuration is lost.
Called by `pipeline.history`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_metadata as mlmd
from ml_metadata.proto import metadata_store_pb2

from models.trainer import CONFIG_KEY
from models.tuner import TUNER_CONFIG_KEY
from pipeline.lineage import input_artifacts, output_artifacts, properties

# What a component is given -> what a person calls it; a setting keeps its name in the configuration. The longest one counts.
_NAMES = {
    "ImportExampleGen.input_base": "data folder",
    "StatisticsGen.stats_options_json._feature_allowlist": "columns",
    "DataGate": "data_gate",
    "DataGate.code": "data gate code",
    "Transform.custom_config": "",
    "Transform.custom_config.code": "preprocessing code",
    "Tuner.custom_config": "tuner",
    f"Tuner.custom_config.{TUNER_CONFIG_KEY}": "tuner",
    f"Trainer.custom_config.{CONFIG_KEY}": "",
    f"Trainer.custom_config.{CONFIG_KEY}.code": "training code",
    "ServingCheck.config": "serving_check",
    "ServingCheck.code": "serving check code",
}
_LEFT_OUT = (
    f"Tuner.custom_config.{CONFIG_KEY}",  # the Trainer's, too
    f"Trainer.custom_config.{CONFIG_KEY}.cache_dir",
    "Evaluator.eval_config",  # told by its limits
    "ImportExampleGen.input_fingerprint",  # the driver's, not on record where the examples were reused: theirs is read
    "ImportExampleGen.span",
    "Pusher.",
)
_OPAQUE = ("data", "schema", "evaluation")  # of which only that they changed says something; so for everything called code
_EVALUATION = "evaluation"
_INPUTS = {
    "hyperparameters": "hyperparameters of the tuner",
    "base_model": "model to start from",
    "baseline_model": "model to compare with",
}
_MAX_VALUE = 40  # characters of a setting's value in the table


def read_facts(store: mlmd.MetadataStore, node: str, execution: metadata_store_pb2.Execution) -> dict[str, Any]:
    """Returns what a component was given: what a person calls it -> value.

    Args:
      store: the metadata store.
      node: id of the component in the pipeline.
      execution: of the component, in one run.
    """
    facts = {}
    for path, value in _flatten(properties(execution), node):
        name = _name(path)
        if name:
            facts[name] = value
    if node == "Evaluator":
        facts |= _evaluation_facts(properties(execution).get("eval_config") or {})
    if fingerprint := _data_fingerprint(store, execution):
        facts["data"] = fingerprint
    inputs = input_artifacts(store, execution)
    facts |= {words: inputs[key].id if key in inputs else None for key, words in _INPUTS.items() if key in inputs}
    if node == "Trainer" and "schema" in inputs:
        facts["schema"] = inputs["schema"].custom_properties["fingerprint"].string_value or inputs["schema"].id
    return facts


def _data_fingerprint(store: mlmd.MetadataStore, execution: metadata_store_pb2.Execution) -> str:
    """Returns sizes and times of the records that an ImportExampleGen read; empty for another component."""
    for artifact in output_artifacts(store, [execution.id]):
        if artifact.type == "Examples":
            return artifact.custom_properties["input_fingerprint"].string_value
    return str(properties(execution).get("input_fingerprint", ""))


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}")
    else:
        yield path, value


def _name(path: str) -> str:
    """Returns what a person calls a component's parameter; empty for what says nothing to one."""
    if path.startswith(_LEFT_OUT):
        return ""
    for prefix in sorted(_NAMES, key=len, reverse=True):
        if path == prefix or path.startswith(f"{prefix}."):
            return f"{_NAMES[prefix]}{path.removeprefix(prefix)}".lstrip(".")
    return path


def _evaluation_facts(eval_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a model was judged by, and the configuration as a whole."""
    facts: dict[str, Any] = {_EVALUATION: json.dumps(eval_config, sort_keys=True)}
    for spec in eval_config.get("metrics_specs", []):
        for metric in spec.get("metrics", []):
            config = metric.get("config") or ""
            settings = json.loads(config) if config.startswith("{") else {}
            if "config" not in settings:
                continue
            facts["evaluation code"] = settings.get("code")
            for name, value in settings["config"].items():
                if name != "thresholds":
                    facts[f"{_EVALUATION}.{name}"] = value
            for threshold in settings["config"].get("thresholds", ()):
                what = " ".join(threshold[name] for name in ("metric", "class_name", "slice") if threshold.get(name))
                for bound in ("min", "max", "max_worsening"):
                    if threshold.get(bound) is not None:
                        facts[f"{_EVALUATION}.thresholds ({what} {bound})"] = threshold[bound]
    return facts


def describe_changes(facts: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns in words what the components of a run were given otherwise than before.

    Args:
      facts: component -> what `read_facts` found of this run.
      known: the same of the runs before; components that are in one only are passed over.
    """
    found: dict[str, str] = {}
    for node, given in facts.items():
        earlier = known.get(node)
        if earlier is None:
            continue
        for name in [*given, *(name for name in earlier if name not in given)]:
            before, now = earlier.get(name), given.get(name)
            if before == now:
                continue
            if name == "data":
                found[name] = f"data{_changed_splits(before, now)}"
            elif name in _OPAQUE or name.endswith(" code"):
                found[name] = name
            else:
                found[name] = f"{name} {_short(before)} -> {_short(now)}"
    if any(name.startswith((f"{_EVALUATION}.", f"{_EVALUATION} ")) for name in found):
        found.pop(_EVALUATION, None)  # said better
    return list(found.values())


def _changed_splits(before: Any, now: Any) -> str:
    """Names the splits whose files differ, where that is not all of them."""
    lines = set(str(before).splitlines()), set(str(now).splitlines())
    changed = [line.split(",")[0].removeprefix("split:") for line in str(now).splitlines() if line not in lines[0]]
    return f" ({', '.join(changed)})" if changed and len(changed) < len(lines[1]) else ""


def _short(value: Any) -> str:
    text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 1]}…"
