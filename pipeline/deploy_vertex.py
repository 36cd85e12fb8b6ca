"""The commands of `pipeline.deploy` that speak with Vertex AI: their arguments, their settings and what they show.

Settings come from a TOML file and the environment, as for the runners; `--project`, `--region`, `--endpoint` and `--pipeline`
win over them, and are enough where a model is not uploaded: then nothing else is loaded, and an answer takes three seconds.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from data.errors import InputError, validate
from pipeline.console import live
from pipeline.vertex import VertexConfig, serving_image

if TYPE_CHECKING:  # they load Google's libraries
    from pipeline.endpoints import Deployment, Rollout

ENDPOINT_HELP = "display name of the endpoint (default: vertex.endpoint, or the pipeline's name)"
_PREFIX = "TFX_VISION_"  # of variables, as in `pipeline.config`, which takes seconds to load
_RUN_BY_HAND = "by-hand"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a command goes by: the section `vertex`, and the pipeline's name."""

    config: VertexConfig
    pipeline_name: str


def percentage(text: str) -> int:
    """Reads a share of the traffic, in [1, 100]."""
    if not 1 <= int(text) <= 100:
        raise ValueError
    return int(text)


def add_commands(commands: Any) -> None:
    """Adds the commands for what is on Vertex AI already."""
    promote = _add_command(
        commands,
        "promote",
        _promote,
        help="give the version that is on trial more of the traffic, up to all",
        description="Goes on with the version that `canary` put on trial: by steps of the traffic, with a check of its answers "
        "at each. With all of it the version becomes `default`, and the earlier one, then `previous`, is undeployed. "
        "If an answer is wrong, the version is taken back and the exit code is 1.",
    )
    promote.add_argument("--to", type=percentage, default=100, metavar="PERCENT", help="to stop at (default: %(default)s)")
    _add_check_arguments(promote, "beside the version's SavedModel")
    rollback = _add_command(
        commands,
        "rollback",
        _rollback,
        help="take back the version that is on trial, or go back to the previous one",
        description="Takes back the version that is on trial. Without one, deploys the version `previous` again, gives it all "
        "of the traffic and undeploys the present one. Repeating it does not go back further; --version does.",
    )
    rollback.add_argument("--version", default="", metavar="NUMBER", help="to go back to (default: the previous one)")
    undeploy = _add_command(
        commands,
        "undeploy",
        _undeploy,
        help="undeploy what has no traffic, or everything",
        description="Undeploys what has no traffic. --all undeploys everything, so that nothing costs any longer, and asks for "
        "the endpoint's name first. The model's versions stay in the registry, where they cost nothing.",
    )
    undeploy.add_argument("--all", action="store_true", help="also what has traffic: the endpoint answers nobody then")
    undeploy.add_argument("--yes", action="store_true", help="do not ask, for scripts")
    undeploy.add_argument("--delete-endpoint", action="store_true", help="delete the endpoint too")
    status = _add_command(
        commands,
        "status",
        _status,
        help="show versions, deployed models and their traffic",
        description="Shows the versions of the pipeline's model, and the deployed ones with their share of the traffic.",
    )
    status.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _add_command(
    commands: Any, name: str, command: Callable[[argparse.Namespace, Console], None], **texts: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, **texts)
    parser.add_argument("--endpoint", metavar="NAME", help=ENDPOINT_HELP)
    _add_target_arguments(parser)
    parser.set_defaults(command=command)
    return parser


def _add_target_arguments(parser: argparse.ArgumentParser) -> Any:
    target = parser.add_argument_group("Vertex AI")
    target.add_argument("--project", metavar="ID", help="of Google Cloud (default: vertex.project)")
    target.add_argument("--region", metavar="NAME", help="of Vertex AI (default: vertex.region)")
    target.add_argument("--pipeline", metavar="NAME", help="of which the model is a version (default: the configuration's)")
    target.add_argument("--config", metavar="FILE", help=f"TOML file (default: {_PREFIX}CONFIG)")
    target.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting; may be repeated")
    return target


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a command that uploads a model takes, but for the endpoint's name."""
    target = _add_target_arguments(parser)
    target.add_argument("--run", metavar="NAME", help=f"of the run that made the model, a label (default: {_RUN_BY_HAND})")
    _add_check_arguments(target, "beside the model, in model_run")


def _add_check_arguments(parser: Any, place: str) -> None:
    references = parser.add_mutually_exclusive_group()
    references.add_argument("--references", metavar="FILE", help=f"the trainer's reference predictions (default: {place})")
    references.add_argument("--unchecked", action="store_true", help="compare no answers")


def refuse_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what `push` takes for an endpoint only.

    Raises:
      InputError: if there is any.
    """
    names = ("project", "region", "pipeline", "config", "set", "run", "references", "unchecked")
    if given := [f"--{name}" for name in names if getattr(arguments, name)]:
        raise InputError(
            f"Expected {', '.join(given)} with --endpoint only. Received: --destination. Leave them out, or name the endpoint."
        )


def read_settings(arguments: argparse.Namespace, console: Console) -> Settings:
    """Reads the settings; arguments win over the file and the environment.

    Raises:
      InputError: if one is wrong, or the project or the pipeline's name is missing.
    """
    config, name = VertexConfig(), ""
    path = arguments.config or os.environ.get(f"{_PREFIX}CONFIG")
    if path or arguments.set or any(variable.startswith(_PREFIX) for variable in os.environ):
        with live(console, Spinner("dots", "Reading the settings"), transient=True):
            from pipeline.config import load_config

            loaded = load_config(path, overrides=arguments.set)
        config, name = loaded.vertex, loaded.pipeline_name
    given = {key: getattr(arguments, key) for key in ("project", "region", "endpoint") if getattr(arguments, key)}
    config = validate(VertexConfig, config.model_dump() | given)
    name = arguments.pipeline or name
    if missing := [f"--{key}" for key, value in (("project", config.project), ("pipeline", name)) if not value]:
        raise InputError(
            f"Expected {' and '.join(missing)}. Received: nothing. Give it, or --config FILE with the settings of the run."
        )
    return Settings(config, name)


@contextmanager
def _rollout(settings: Settings, console: Console) -> "Iterator[Rollout]":
    """Gives what speaks with Vertex AI, and shows what it is at."""
    spinner = Spinner("dots", "Loading Google's libraries")
    with live(console, spinner, transient=True):
        from pipeline.endpoints import Rollout

        spinner.update(text="Waiting for Vertex AI")
        yield Rollout(settings.config, pipeline_name=settings.pipeline_name, report=lambda text: _say(console, text))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def deploy(
    settings: Settings,
    arguments: argparse.Namespace,
    console: Console,
    *,
    model: str,
    digest: str,
    workspace: Path | None,
    steps: Sequence[int],
) -> None:
    """Brings a blessed model to the endpoint by steps of the traffic.

    Args:
      settings: where, and how.
      arguments: of `add_model_arguments`.
      console: of the terminal.
      model: folder of the SavedModel; one on this machine is copied into the bucket first.
      digest: of it.
      workspace: that made it, if that is known.
      steps: percentages of the traffic.

    Raises:
      InputError: if there are no reference predictions, no image that serves, or no bucket for a model of this machine.
    """
    config = settings.config
    with live(console, Spinner("dots", "Loading Google's libraries"), transient=True):
        from data.fingerprint import code_fingerprint
        from data.inspection import is_remote
        from pipeline.endpoints import deploy_model

        if not serving_image(config):
            raise InputError(
                "Expected the container image that serves. Received: none. Set `vertex.image`, or vertex.serving_container to "
                'prebuilt: `--set vertex.serving_container="prebuilt"`.'
            )
        references = None if arguments.unchecked else _references(arguments, model, digest=digest, workspace=workspace)
        if not is_remote(model):
            model, references = _copied_to_bucket(settings, model, references, digest=digest)
    with live(console, Spinner("dots", "Waiting for Vertex AI"), transient=True):
        deployment = deploy_model(
            config,
            pipeline_name=settings.pipeline_name,
            run_name=arguments.run or _RUN_BY_HAND,
            code=code_fingerprint("pipeline.endpoints"),
            model=model,
            references=references,
            digest=digest,
            report=lambda text: _say(console, text),
            steps=steps,
        )
    _say_deployment(console, deployment)


def _references(arguments: argparse.Namespace, model: str, *, digest: str, workspace: Path | None) -> str:
    """Finds the reference predictions of a model: as named, beside it, or beside the original in its workspace."""
    import tensorflow as tf

    from pipeline.blessing import find_model, open_metadata
    from pipeline.canary import find_references

    if arguments.references:
        named = os.path.expanduser(arguments.references)
        if not tf.io.gfile.exists(named):
            raise InputError(f"Expected --references to be a file. Received: {named!r}. Name the one in the run's model_run.")
        return named
    if found := find_references(os.path.abspath(model) if "://" not in model else model):
        return found
    if workspace:
        with open_metadata(workspace) as store:
            original = find_model(store, digest)
        if original and (found := find_references(original.uri)):
            return found
    raise InputError(
        f"Expected reference predictions beside {model}, in model_run. Received: none. Name the file with --references, or "
        "compare no answers: --unchecked."
    )


def _copied_to_bucket(settings: Settings, model: str, references: str | None, *, digest: str) -> tuple[str, str | None]:
    """Copies a model of this machine, and its reference predictions, to where Vertex AI can read them; once for each digest."""
    import tensorflow as tf

    from models.reference import REFERENCE_FILE
    from pipeline.model_digest import model_digest
    from pipeline.versions import latest_version, push_model

    bucket = settings.config.bucket
    if not bucket:
        raise InputError(
            f"Expected a bucket to copy {model} into, where Vertex AI can read it. Received: none. Set `vertex.bucket`, or "
            "give a model in a bucket."
        )
    folder = f"{bucket.rstrip('/')}/{settings.pipeline_name}/deployed/{digest[:16]}"
    try:
        # TensorFlow asks for ever to write into a bucket that is not there.
        if not tf.io.gfile.isdir("/".join(bucket.split("/")[:3])):
            raise InputError(
                f"Expected `vertex.bucket` to exist. Received: {bucket}. Make it, name another, or, if it exists, ask for "
                "roles/storage.legacyBucketReader on it."
            )
        version = latest_version(f"{folder}/model")
        copy = f"{folder}/model/{version}"
        if version is None or model_digest(copy) != digest:
            copy = push_model(model, f"{folder}/model", digest=digest)
        if references:
            target = f"{folder}/model_run/{copy.rpartition('/')[2]}/{REFERENCE_FILE}"
            tf.io.gfile.makedirs(os.path.dirname(target))
            tf.io.gfile.copy(references, target, overwrite=True)
    except tf.errors.OpError as error:
        raise InputError(
            f"Expected to copy {model} into {folder}. Received: {' '.join(error.message.split())[:300]}. Compare "
            "`vertex.bucket` and the permissions on it."
        ) from error
    return copy, references


def _promote(arguments: argparse.Namespace, console: Console) -> None:
    settings = read_settings(arguments, console)
    steps = (*(step for step in settings.config.traffic_steps if step < arguments.to), arguments.to)
    with _rollout(settings, console) as rollout:
        deployment = rollout.promote(arguments.references, steps, is_checked=not arguments.unchecked)
    _say_deployment(console, deployment)


def _rollback(arguments: argparse.Namespace, console: Console) -> None:
    with _rollout(read_settings(arguments, console), console) as rollout:
        deployment = rollout.rollback(arguments.version)
    if deployment:
        _say_deployment(console, deployment)
    else:
        _say(console, "The endpoint serves no model now.")


def _say_deployment(console: Console, deployment: "Deployment") -> None:
    _say(console, f"Serves  {deployment.model_version}, {deployment.traffic_percent} % of the traffic")
    _say(console, f"at      {deployment.endpoint}")
    if deployment.traffic_percent < 100:
        _say(console, "Go on with `python -m pipeline.deploy promote`, or take it back with `rollback`.")


def _undeploy(arguments: argparse.Namespace, console: Console) -> None:
    settings = read_settings(arguments, console)
    name = settings.config.endpoint or settings.pipeline_name
    if arguments.all and not arguments.yes:
        if not console.is_terminal:
            raise InputError("Expected --yes with --all where nobody can be asked. Received: --all alone. Add it.")
        if console.input(f"This stops serving. Type the endpoint's name, {escape(name)}, to go on: ") != name:
            raise InputError(f"Expected the endpoint's name, {name}. Received: another text. Nothing was undeployed.")
    with _rollout(settings, console) as rollout:
        rollout.undeploy(everything=arguments.all, delete_endpoint=arguments.delete_endpoint)
    _say(console, "Done")


def _status(arguments: argparse.Namespace, console: Console) -> None:
    settings = read_settings(arguments, console)
    with _rollout(settings, console) as rollout:
        under_way = rollout.endpoint.under_way() if rollout.endpoint.find() else []
        state = rollout.look()
    facts = {
        "project": settings.config.project,
        "region": settings.config.region,
        "pipeline": settings.pipeline_name,
        "endpoint": state.endpoint.name or None,
        "under_way": under_way,
        **state.describe(),
    }
    if arguments.json:
        console.file.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        return
    _print_status(console, facts)


def _print_status(console: Console, facts: dict[str, Any]) -> None:
    """Prints what `status --json` gives, the deployed models and the versions as tables."""
    _say(console, f"Endpoint  {facts['endpoint'] or 'none'}")
    for name in facts["under_way"]:
        _say(console, f"Under way  {name}")
    deployed = _table("version", "role", "machine", "replicas", "deployed (UTC)", "traffic")
    for one in facts["deployed"]:
        gpus = f" + {one['accelerator_count']} {one['accelerator_type']}" if one["accelerator_type"] else ""
        deployed.add_row(
            one["version"] if one["is_ours"] else escape(f"{one['version']} of {one['model']}"),
            one["role"],
            one["machine_type"] + gpus,
            f"{one['min_replicas']} to {one['max_replicas']}",
            _minute(one["deployed"]),
            f"{one['traffic_percent']:>3} %",
        )
    console.print(deployed if facts["deployed"] else "Nothing is deployed.")
    _say(console, f"\nModel     {facts['model'] if facts['versions'] else 'none'}")
    versions = _table("version", "aliases", "SHA-256", "uploaded (UTC)", "run")
    for one in facts["versions"]:
        versions.add_row(
            one["version"], ", ".join(one["aliases"]), one["digest"][:16], _minute(one["uploaded"]), escape(one["run"])
        )
    if facts["versions"]:
        console.print(versions)
    for one in facts["versions"]:
        if one["description"]:
            _say(console, f"Version {one['version']}: {one['description']}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _minute(moment: str | None) -> str:
    return (moment or "")[:16].replace("T", " ")
