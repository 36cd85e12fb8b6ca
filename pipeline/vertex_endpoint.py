"""The endpoint of one pipeline on Vertex AI: found or made, its deployed models and its traffic.

Every change is asked for in a way that may be repeated: the endpoint's id is made of its name, so that two requests cannot make
two; operations that an interrupted command left running are waited for; before anything is made, it is looked for.

Two commands at once: a change of the traffic carries the `etag` of the endpoint that it was computed from, and is given up
where somebody else changed the traffic meanwhile. `DeployModel` has no `etag`: of two at the same moment the later one's
traffic counts, and the earlier one finds the traffic otherwise than it left it and takes its model away. In the end at most
one of the two serves.

Called by `pipeline.endpoints`.
"""

import contextlib
from collections.abc import Callable, Mapping

from google.api_core import exceptions, retry
from google.cloud.aiplatform_v1 import EndpointServiceClient, types

from data.errors import InputError
from pipeline import cloud_calls
from pipeline.cloud_calls import (
    explaining,
    finish,
    is_transient,
    once,
    repeated,
    running_operations,
    until_made,
    wait_for_operations,
)
from pipeline.vertex import VertexConfig
from pipeline.vertex_state import PIPELINE_LABEL, State, label_value, last_part, resource_id, split_traffic

_NEW_ID = "0"  # of the model that a DeployModel request is about, in its traffic split
_MAX_STEM = 100  # characters of the pipeline's name in a deployed model's, which has 128 at most


class VertexEndpoint:
    """The endpoint; `name`, projects/P/locations/L/endpoints/ID, is empty until it is found or made."""

    def __init__(self, config: VertexConfig, *, pipeline_name: str, report: Callable[[str], None]):
        """Finds the credentials; asks for nothing yet.

        Args:
          config: where, and on what machines.
          pipeline_name: of the pipeline.
          report: takes a sentence on what is being done.

        Raises:
          InputError: without credentials.
        """
        self._config = config
        self._pipeline_name = pipeline_name
        self._report = report
        self._parent = f"projects/{config.project}/locations/{config.region}"
        self.display_name = config.endpoint or pipeline_name
        self.name = ""
        with explaining("speak with Vertex AI"):
            self._client = EndpointServiceClient(client_options={"api_endpoint": f"{config.region}-aiplatform.googleapis.com"})

    def find(self) -> bool:
        """Looks for it by its display name and the pipeline's label; tells whether it is there.

        Raises:
          InputError: if there are several, or those of that name are not this pipeline's.
        """
        # Services differ in how a filter quotes a label's key, so labels are compared here.
        quoted = self.display_name.replace("\\", "\\\\").replace('"', '\\"')
        request = types.ListEndpointsRequest(parent=self._parent, filter=f'display_name="{quoted}"')
        with explaining("list endpoints"):
            named = list(self._client.list_endpoints(request, **repeated()))
        label = label_value(self._pipeline_name)
        found = [endpoint.name for endpoint in named if endpoint.labels.get(PIPELINE_LABEL) == label]
        if len(found) > 1:
            raise InputError(
                f"Expected one endpoint {self.display_name!r} of this pipeline. Received: {', '.join(found)}. Delete all but "
                "one, or give them other names."
            )
        if named and not found:
            raise InputError(
                f"Expected the endpoint {self.display_name!r} to have the label {PIPELINE_LABEL}={label}. Received: "
                f"{', '.join(endpoint.name for endpoint in named)}, without it. Name another endpoint, or give it to this "
                f"pipeline: gcloud ai endpoints update {last_part(named[0].name)} --region={self._config.region} "
                f"--update-labels={PIPELINE_LABEL}={label}"
            )
        self.name = found[0] if found else ""
        return bool(found)

    def ensure(self) -> None:
        """Finds it, or makes it.

        Raises:
          InputError: see `find`.
        """
        doing = f"make the endpoint {self.display_name}"
        labels = {**self._config.labels, PIPELINE_LABEL: label_value(self._pipeline_name)}
        request = types.CreateEndpointRequest(
            parent=self._parent,
            endpoint=types.Endpoint(display_name=self.display_name, labels=labels),
            endpoint_id=resource_id(self.display_name),
        )

        name = f"{self._parent}/endpoints/{request.endpoint_id}"

        def find_or_make() -> None:
            if self.find() or (wait_for_operations(self._client, name, self._report) and self.find()):
                return
            self._report(f"Making the endpoint {self.display_name}")
            try:
                making = self._client.create_endpoint(request, **once())
            except exceptions.AlreadyExists:
                self._refuse_renamed(name)
                raise
            self.name = finish(making, doing).name

        with explaining(doing):
            until_made(find_or_make)

    def _refuse_renamed(self, name: str) -> None:
        with contextlib.suppress(exceptions.NotFound):  # it is being made by another request
            found = self._client.get_endpoint(name=name, **repeated()).display_name
            if found != self.display_name:
                raise InputError(
                    f"Expected {name} to have the name {self.display_name!r} still. Received: {found!r}. Give --endpoint that "
                    "name, or delete it."
                )

    def under_way(self) -> list[str]:
        """Returns the names of the operations on it that have not ended."""
        with explaining(f"list what is under way on the endpoint {self.display_name}"):
            return running_operations(self._client, self.name)

    def wait(self) -> None:
        """Waits for what an interrupted command, or another one, has begun on it."""
        with explaining(f"wait for what is under way on the endpoint {self.display_name}"):
            wait_for_operations(self._client, self.name, self._report)

    def get(self) -> types.Endpoint:
        """Asks for it."""
        with explaining(f"read the endpoint {self.display_name}"):
            return self._client.get_endpoint(name=self.name, **repeated())

    def ensure_deployed(
        self, version: str, share: int, *, require: Callable[[types.Endpoint], None] = lambda endpoint: None
    ) -> tuple[types.DeployedModel, dict[str, int]]:
        """Deploys a version with a share of the traffic, unless it is deployed and has traffic already.

        One without traffic is what a deployment that failed, or a rollback that was interrupted, has left; it is replaced.

        Args:
          version: name of the version, projects/P/locations/L/models/ID@V.
          share: percentage of the traffic, in [1, 100].
          require: raises where the endpoint, as it is just before, must not be changed.

        Returns:
          The deployed model, and the split of the traffic: deployed model's id -> percentage.
        """
        number, model_id = version.rpartition("@")[2], last_part(version)
        doing = f"deploy version {number} to the endpoint {self.display_name}"

        def find_or_make() -> tuple[types.DeployedModel, dict[str, int]]:
            wait_for_operations(self._client, self.name, self._report)
            state = State(self.get(), {}, model_id)
            require(state.endpoint)
            found = state.deployed(number)
            if found is not None and state.share(found):
                return found, dict(state.endpoint.traffic_split)
            if found is not None:
                self.undeploy(found)
            self._report(
                f"Deploying version {number} with {share} % of the traffic on {self._config.serving_machine_type}, in general "
                "5 to 15 minutes"
            )
            split = split_traffic(state.endpoint.traffic_split, _NEW_ID, share)
            request = types.DeployModelRequest(
                endpoint=self.name,
                deployed_model=self._deployed_model(version, f"{self._pipeline_name[:_MAX_STEM]}-{number}"),
                traffic_split=split,
            )
            made = finish(self._client.deploy_model(request, **once()), doing).deployed_model
            return made, {made.id if key == _NEW_ID else key: value for key, value in split.items()}

        with explaining(doing):
            return cloud_calls.RETRY(find_or_make)()

    def _deployed_model(self, version: str, display_name: str) -> types.DeployedModel:
        config = self._config
        machine = types.MachineSpec(machine_type=config.serving_machine_type)
        if config.serving_accelerator_type:
            machine.accelerator_type = config.serving_accelerator_type
            machine.accelerator_count = config.serving_accelerator_count
        return types.DeployedModel(
            model=version,
            display_name=display_name,
            dedicated_resources=types.DedicatedResources(
                machine_spec=machine, min_replica_count=config.min_replicas, max_replica_count=config.max_replicas
            ),
            service_account=config.service_account,
        )

    def differences(self, deployed: types.DeployedModel) -> str:
        """Says in what a deployed model differs from the settings, a sentence; empty where it does not."""
        wanted = self._deployed_model(deployed.model, deployed.display_name)
        now, then = (_describe_machines(one) for one in (deployed, wanted))
        if wanted.service_account not in ("", deployed.service_account):
            now, then = (
                f"{text} as {one.service_account or 'the default account'}" for text, one in ((now, deployed), (then, wanted))
            )
        return (
            f"Version {deployed.model_version_id} stays on {now}; the settings, {then}, hold for the next one"
            if now != then
            else ""
        )

    def set_traffic(
        self, deployed_id: str, share: int, *, heir: str = "", expected: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Gives a deployed model a share of the traffic; see `split_traffic`.

        Args:
          deployed_id: of the deployed model.
          share: percentage, in [0, 100].
          heir: id of the one that gets the rest where no other has traffic.
          expected: the split as this command left it; None where any will do.

        Returns:
          The split as it is now.

        Raises:
          RuntimeError: if somebody else changed the traffic.
        """

        def attempt() -> dict[str, int]:
            endpoint = self.get()
            now = dict(endpoint.traffic_split)
            split = split_traffic(now, deployed_id, share, heir=heir)
            if expected is not None and now not in (expected, split_traffic(expected, deployed_id, share, heir=heir)):
                raise RuntimeError(
                    f"Expected the traffic of the endpoint {self.display_name} to be as this command left it, "
                    f"{dict(expected)}. Received: {now}, so somebody else is changing it. Look at "
                    "`python -m pipeline.deploy status`."
                )
            if now != split:
                changed = types.Endpoint(name=endpoint.name, traffic_split=split, etag=endpoint.etag)
                request = types.UpdateEndpointRequest(endpoint=changed, update_mask={"paths": ["traffic_split"]})
                self._client.update_endpoint(request, **once())
            return split

        # Where the endpoint was changed under way, by whom is seen at the next look.
        was_changed = retry.if_exception_type(exceptions.FailedPrecondition)
        with explaining(f"change the traffic of the endpoint {self.display_name}"):
            return cloud_calls.RETRY.with_predicate(lambda error: is_transient(error) or was_changed(error))(attempt)()

    def stop_traffic(self) -> None:
        """Leaves no deployed model any traffic."""
        changed = types.Endpoint(name=self.name)
        request = types.UpdateEndpointRequest(endpoint=changed, update_mask={"paths": ["traffic_split"]})
        with explaining(f"stop the traffic of the endpoint {self.display_name}"):
            self._client.update_endpoint(request, **repeated())

    def undeploy(self, deployed: types.DeployedModel) -> None:
        """Takes a deployed model, which must have no traffic, off the endpoint, if it still is there."""
        doing = f"undeploy version {deployed.model_version_id}"

        def attempt() -> None:
            wait_for_operations(self._client, self.name, self._report)
            if any(one.id == deployed.id for one in self.get().deployed_models):
                self._report(f"Undeploying version {deployed.model_version_id} of {last_part(deployed.model)}")
                request = types.UndeployModelRequest(endpoint=self.name, deployed_model_id=deployed.id)
                finish(self._client.undeploy_model(request, **once()), doing)

        with explaining(doing):
            cloud_calls.RETRY(attempt)()

    def delete(self) -> None:
        """Deletes it; it must have no deployed model."""
        doing = f"delete the endpoint {self.display_name}"

        def attempt() -> None:
            wait_for_operations(self._client, self.name, self._report)
            with contextlib.suppress(exceptions.NotFound):
                finish(self._client.delete_endpoint(name=self.name, **once()), doing)

        with explaining(doing):
            cloud_calls.RETRY(attempt)()


def _describe_machines(deployed: types.DeployedModel) -> str:
    resources = deployed.dedicated_resources
    machine, low, high = resources.machine_spec, resources.min_replica_count, resources.max_replica_count
    gpus = f" with {machine.accelerator_count} {machine.accelerator_type.name}" if machine.accelerator_count else ""
    return f"{low if low == high else f'{low} to {high}'} x {machine.machine_type}{gpus}"
