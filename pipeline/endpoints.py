"""Deploys models to a Vertex AI endpoint step by step, checks what they answer there, and takes bad ones back by itself.

A SavedModel becomes a version of the pipeline's one model. It gets a first share of the traffic, the canary's; its answers to
real images are compared with those of training; it gets the next share, and so on. With all of the traffic it becomes the
version `default`, the one before it `previous`, and that one is undeployed. Whatever goes wrong before, the earlier model gets
all of the traffic back and the new one is undeployed; a refused version stays in the registry, with the label
tfx-vision-verdict=refused and the reason as its description.

Nothing is remembered but on Vertex AI, so every function may be interrupted anywhere, also by `kill -9`, and repeated: it goes
on from what is there. An endpoint takes one rollout at a time; another version on trial is reported, not replaced. What two
commands at once come to, `pipeline.vertex_endpoint` says.

Called by `pipeline.components.VertexDeployer` and `pipeline.deploy_vertex`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from google.cloud.aiplatform_v1 import types

from data.errors import InputError
from pipeline.model_registry import ModelRegistry, explanation_spec
from pipeline.vertex import VertexConfig
from pipeline.vertex_endpoint import VertexEndpoint
from pipeline.vertex_state import (
    CANARY_ALIAS,
    DEFAULT_ALIAS,
    PREVIOUS_ALIAS,
    REFUSED,
    WITHDRAWN,
    CanaryError,
    State,
    last_part,
)

if TYPE_CHECKING:  # loads TensorFlow, for which no command but one that checks answers has a use
    from pipeline.canary import CanaryCheck

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What serves at the end.

    Attributes:
      model_version: projects/P/locations/L/models/ID@V.
      endpoint: projects/P/locations/L/endpoints/ID.
      deployed_model_id: of the version on the endpoint.
      traffic_percent: that it gets.
    """

    model_version: str
    endpoint: str
    deployed_model_id: str
    traffic_percent: int


def deploy_model(
    config: VertexConfig,
    *,
    pipeline_name: str,
    run_name: str,
    code: str,
    model: str,
    references: str | None,
    digest: str,
    report: Report,
    steps: Sequence[int] | None = None,
) -> Deployment:
    """Uploads a blessed model unless it is there, and deploys it by steps of the traffic, each with a check of its answers.

    The first model of an endpoint gets all of the traffic at once, then the check. Steps that do not end in 100 leave the
    model on trial, for `promote`.

    Args:
      config: where, on what machines, and how strict the check is.
      pipeline_name: of which the model is a version.
      run_name: of the run that trained it; a label.
      code: fingerprint of the code; a label.
      model: gs:// folder of the SavedModel; the caller has seen both of its blessings.
      references: path of the trainer's reference predictions; None to compare no answers.
      digest: of the model, as `pipeline.model_digest` gives it.
      report: takes a sentence on each step.
      steps: percentages, growing; those of `config` by default.

    Raises:
      InputError: if credentials, permissions, quota or a setting are wrong, or another version is on trial.
      RuntimeError: if the model answers otherwise than in training, or Vertex AI fails; the earlier model serves on.
    """
    rollout = Rollout(config, pipeline_name=pipeline_name, report=report)
    check = rollout.make_check(model, references)
    explanation = explanation_spec(model, config.explanations) if config.explanations else None
    rollout.endpoint.ensure()
    version = rollout.registry.ensure_version(model, digest=digest, run_name=run_name, code=code, explanation=explanation)
    return rollout.roll_out(version.version_id, check, steps or config.traffic_steps)


class Rollout:
    """The model and the endpoint of one pipeline, and how a version gets there and away again."""

    def __init__(self, config: VertexConfig, *, pipeline_name: str, report: Report):
        """Finds the credentials; asks for nothing yet.

        Args:
          config: where, and on what machines.
          pipeline_name: of the pipeline.
          report: takes a sentence on what is being done.

        Raises:
          InputError: without a project or credentials.
        """
        if not config.project:
            raise InputError(
                "Expected a Google Cloud project. Received: none. Give --project, set `vertex.project` in the TOML file, or "
                "set TFX_VISION_VERTEX__PROJECT."
            )
        self._config = config
        self._report = report
        self.registry = ModelRegistry(config, pipeline_name=pipeline_name, report=report)
        self.endpoint = VertexEndpoint(config, pipeline_name=pipeline_name, report=report)

    def make_check(self, model: str, references: str | None) -> "CanaryCheck | None":
        """Reads the images and answers that a model is checked with; None, and a word about it, without any.

        Args:
          model: folder of the SavedModel.
          references: path of the reference predictions, or None.
        """
        if not references:
            self._report("There are no reference predictions, so the answers are not compared")
            return None
        from pipeline.canary import CanaryCheck, read_references

        return CanaryCheck(
            read_references(references, model, max_images=self._config.canary_images),
            region=self._config.region,
            max_difference=self._config.max_canary_difference,
        )

    def read(self) -> State:
        """Asks for the endpoint and the versions, once nothing is under way there.

        Raises:
          InputError: if there is no endpoint.
        """
        if not self.endpoint.name and not self.endpoint.find():
            raise InputError(
                f"Expected an endpoint {self.endpoint.display_name!r} in {self._config.region}. Received: none. Name it with "
                "--endpoint, or deploy a model: `python -m pipeline.deploy canary`."
            )
        self.endpoint.wait()
        return self.look()

    def look(self) -> State:
        """Asks for the endpoint, if it was found, and the versions, whatever is under way."""
        endpoint = self.endpoint.get() if self.endpoint.name else types.Endpoint()
        return State(endpoint, self.registry.versions(), last_part(self.registry.model_name))

    def roll_out(self, number: str, check: "CanaryCheck | None", steps: Sequence[int]) -> Deployment:
        """Brings a version through steps of the traffic, from the share that it has; with all of it, it is the default one.

        Args:
          number: of the version.
          check: of its answers, at each step.
          steps: percentages, growing.

        Raises:
          InputError: if another version is on trial.
          RuntimeError: see `deploy_model`.
        """
        state = self.read()
        self._require_sole_trial(state, number)
        deployed = state.deployed(number)
        share = state.share(deployed) if deployed else 0
        if share == 100 and state.is_accepted(number):
            self._report(f"Version {number} has all of the traffic already")
            if differences := self.endpoint.differences(deployed):
                self._report(differences)
            self._undeploy_idle()
            return self._deployment(number, deployed, 100)
        others_serve = any(value for key, value in state.endpoint.traffic_split.items() if not deployed or key != deployed.id)
        plan = sorted({share, *(step for step in steps if step > share)} - {0}) if others_serve else [100]
        try:
            if CANARY_ALIAS not in state.versions[number].version_aliases:
                self.registry.merge_aliases(number, CANARY_ALIAS)

            def require(endpoint: types.Endpoint) -> None:
                self._require_sole_trial(dataclasses.replace(state, endpoint=endpoint), number)

            deployed, split = self.endpoint.ensure_deployed(self._name(number), plan[0], require=require)
            for step in plan:
                split = self.endpoint.set_traffic(deployed.id, step, expected=split)
                found = check.run(self.endpoint.name, deployed.id, step) if check else "its answers are not compared"
                self._report(f"Version {number} has {step} % of the traffic: {found}")
            if plan[-1] == 100:
                self._accept(number)
        except Exception as error:
            raise self._taken_back(number, error) from error
        if plan[-1] == 100:
            self._undeploy_idle()
        return self._deployment(number, deployed, plan[-1])

    def _require_sole_trial(self, state: State, number: str) -> None:
        """Lets one version be on trial beside the default one, which a first model is from the beginning."""
        default = state.with_alias(DEFAULT_ALIAS)
        if trials := [one for one in state.trials() if one.model_version_id not in (number, default)]:
            received = ", ".join(f"version {one.model_version_id} with {state.share(one)} %" for one in trials)
            raise InputError(
                f"Expected no other version on trial on the endpoint {self.endpoint.display_name}. Received: {received}. End "
                "that first: `python -m pipeline.deploy promote` or `rollback`."
            )

    def _accept(self, number: str) -> None:
        """Gives the aliases to a version that has all of the traffic; `default` comes last, as the end of the rollout.

        Raises:
          RuntimeError: if somebody else has changed the traffic meanwhile.
        """
        state = self.read()
        deployed = state.deployed(number)
        if not deployed or state.share(deployed) != 100:
            raise RuntimeError(
                f"Expected version {number} to have all of the traffic of the endpoint {self.endpoint.display_name} still. "
                f"Received: {dict(state.endpoint.traffic_split)}, so somebody else is changing it. Look at "
                "`python -m pipeline.deploy status`."
            )
        aliases, earlier = state.versions[number].version_aliases, state.incumbent(number)
        if state.verdict(number):
            self.registry.set_verdict(state.versions[number], "")
        if DEFAULT_ALIAS not in aliases and earlier and earlier.model_version_id != state.with_alias(PREVIOUS_ALIAS):
            self.registry.merge_aliases(earlier.model_version_id, PREVIOUS_ALIAS)
        self.registry.merge_aliases(number, f"-{CANARY_ALIAS}", *([] if DEFAULT_ALIAS in aliases else [DEFAULT_ALIAS]))

    def _taken_back(self, number: str, error: Exception) -> Exception:
        """Takes a version back after an error; returns the error that says so."""
        try:
            verdict = REFUSED if isinstance(error, CanaryError) else ""
            ending = f"{self._remove(number, verdict=verdict, reason=str(error))}."
        except Exception as failure:
            ending = f"Taking version {number} back failed too: {failure} Run `python -m pipeline.deploy rollback`."
        if isinstance(error, CanaryError):
            return RuntimeError(
                f"Expected version {number} to answer on the endpoint {self.endpoint.display_name} as in training. Received: "
                f"{error}. It is refused and taken back. {ending}"
            )
        return (InputError if isinstance(error, InputError) else RuntimeError)(f"{error} {ending}")

    def _remove(self, number: str, *, verdict: str = "", reason: str = "") -> str:
        """Gives a version's traffic back to the others and undeploys it.

        Returns:
          What serves now, a sentence without its full stop.
        """
        state = self.read()
        deployed, heir, version = state.deployed(number), state.incumbent(number), state.versions[number]
        split: Mapping[str, int] = state.endpoint.traffic_split
        if deployed and state.share(deployed):
            split = self.endpoint.set_traffic(deployed.id, 0, heir=heir.id if heir else "")
        if heir and DEFAULT_ALIAS in version.version_aliases:
            self.registry.merge_aliases(heir.model_version_id, DEFAULT_ALIAS)
        if verdict and state.verdict(number) != verdict:
            self.registry.set_verdict(version, verdict, f"{verdict}: {reason}")
        if CANARY_ALIAS in version.version_aliases:
            self.registry.merge_aliases(number, f"-{CANARY_ALIAS}")
        if deployed:
            self.endpoint.undeploy(deployed)
        return state.describe_traffic(split)

    def promote(self, references: str | None, steps: Sequence[int], *, is_checked: bool = True) -> Deployment:
        """Brings the version that is on trial through further steps of the traffic, from the share that it has.

        Args:
          references: path of its reference predictions; None to look beside its SavedModel.
          steps: percentages, growing.
          is_checked: whether its answers are compared.

        Raises:
          InputError: if no version, or more than one, is on trial, or its reference predictions are not found.
          RuntimeError: see `deploy_model`.
        """
        state = self.read()
        default, trials = state.with_alias(DEFAULT_ALIAS), state.trials()
        if len(trials) == 1:
            number = trials[0].model_version_id
            model = state.versions[number].artifact_uri
            found = (references or _found_references(model)) if is_checked else None
            return self.roll_out(number, self.make_check(model, found), steps)
        serving, previous = state.deployed(default), state.with_alias(PREVIOUS_ALIAS)
        was_promoted = any(one.model_version_id == previous for one in state.idle()) and not state.verdict(previous)
        self._undeploy_idle()
        if serving and not trials and was_promoted:  # and was interrupted before it could undeploy the earlier one
            return self._deployment(default, serving, state.share(serving))
        received = [f"version {one.model_version_id} with {state.share(one)} %" for one in state.ours if state.share(one)]
        raise InputError(
            f"Expected one version on trial on the endpoint {self.endpoint.display_name}. Received: "
            f"{', '.join(received) or 'no model with traffic'}. `python -m pipeline.deploy canary` puts one on trial."
        )

    def rollback(self, to: str = "") -> Deployment | None:
        """Takes back the version that is on trial; without one, brings the version before the present one back.

        That one is deployed with all of the traffic, without a check, as time matters then and it has served before. The
        version that was left gets the label tfx-vision-verdict=withdrawn: no further rollback brings it back by itself, and
        none goes behind the default version while a later one was taken back, so that a rollback may be repeated.

        Args:
          to: number of a version to bring back in place of the previous one.

        Returns:
          What serves now; None where nothing does.

        Raises:
          InputError: if there is no version to go back to.
          RuntimeError: if Vertex AI fails; what served serves on.
        """
        state = self.read()
        default, previous = state.with_alias(DEFAULT_ALIAS), state.with_alias(PREVIOUS_ALIAS)
        target, others = to or previous, state.others(default)
        if target == default and others and not any(state.share(one) for one in others):
            return self._leave(others[-1].model_version_id, default)  # a rollback was interrupted
        is_good = target in state.versions and (bool(to) or state.verdict(target) != WITHDRAWN)
        unwanted = [one for one in others if one.model_version_id != target or not is_good]
        for one in unwanted:
            self._report(self._remove(one.model_version_id, verdict=WITHDRAWN, reason="taken back by hand"))
        present = state.deployed(default)
        if (unwanted and not to) or (is_good and target == default and present):
            return self._deployment(default, present, 100) if present else None
        # The last thing that happened here, perhaps by this very command: one rollback more would go a version too far.
        taken_back = [number for number in state.versions if present and int(number) > int(default) and state.verdict(number)]
        if not is_good or target == default or (taken_back and not to):
            known = ", ".join(number for number in state.versions if number != default)
            last = taken_back[-1] if taken_back and not to else target
            raise InputError(
                f"Expected a version to go back to. Received: {f'version {last}' if last else 'none'}"
                f"{', which was itself taken back' if last in state.versions else ''}. "
                f"{state.describe_traffic(state.endpoint.traffic_split)}. "
                f"{f'Name one with --version: {known}.' if known else 'There is no other.'}"
            )
        try:
            deployed, _ = self.endpoint.ensure_deployed(self._name(target), 100)
            self.endpoint.set_traffic(deployed.id, 100)
            self.registry.merge_aliases(target, DEFAULT_ALIAS)
        except Exception as error:
            raise self._taken_back(target, error) from error
        return self._leave(default, target)

    def _leave(self, number: str, default: str) -> Deployment:
        """Ends a rollback, which has given `default` the traffic and the alias: `number` becomes the previous one."""
        state = self.read()
        if state.verdict(number) != WITHDRAWN:
            self.registry.set_verdict(state.versions[number], WITHDRAWN, f"withdrawn: rolled back to version {default}")
        if state.verdict(default):
            self.registry.set_verdict(state.versions[default], "")
        if state.with_alias(PREVIOUS_ALIAS) != number:
            self.registry.merge_aliases(number, PREVIOUS_ALIAS)
        self._undeploy_idle()
        return self._deployment(default, state.deployed(default), 100)

    def undeploy(self, *, everything: bool, delete_endpoint: bool) -> None:
        """Undeploys what has no traffic, or everything; versions stay in the registry, where they cost nothing.

        Args:
          everything: also what has traffic; the endpoint answers nobody then.
          delete_endpoint: as well.

        Raises:
          InputError: if the endpoint is to be deleted though it has traffic.
        """
        if not self.endpoint.find():
            self._report(f"There is no endpoint {self.endpoint.display_name}")
            return
        state = self.read()
        has_traffic = any(state.endpoint.traffic_split.values())
        if has_traffic and delete_endpoint and not everything:
            raise InputError(
                f"Expected --all with --delete-endpoint, as the endpoint {self.endpoint.display_name} has traffic. Received: "
                "--delete-endpoint alone. Add --all to stop serving."
            )
        if has_traffic and everything:
            self.endpoint.stop_traffic()
        for one in state.endpoint.deployed_models:
            if everything or not state.share(one):
                self.endpoint.undeploy(one)
        if delete_endpoint:
            self.endpoint.delete()

    def _undeploy_idle(self) -> None:
        for one in self.read().idle():
            self.endpoint.undeploy(one)

    def _name(self, number: str) -> str:
        return f"{self.registry.model_name}@{number}"

    def _deployment(self, number: str, deployed: types.DeployedModel, share: int) -> Deployment:
        return Deployment(self._name(number), self.endpoint.name, deployed.id, share)


def _found_references(model: str) -> str:
    """Returns the path of the reference predictions beside a model.

    Raises:
      InputError: if there are none.
    """
    from pipeline.canary import find_references

    if found := find_references(model):
        return found
    raise InputError(
        f"Expected reference predictions beside {model}, in model_run. Received: none. Name the file with --references."
    )
