"""Models, endpoints and predictions of `vertex_stand_in`, with the checks that Vertex AI makes."""

import collections
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from google.api import httpbody_pb2
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import types
from google.protobuf import empty_pb2, json_format, struct_pb2
from vertex_world import LongRunning, World, check_labels, find, list_page, merge, now, require_new

MAX_REQUEST_BYTES = 1_572_864  # of a prediction by a public endpoint, 1.5 MiB
_ALIAS = re.compile(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]")
_MODEL_ID = re.compile(r"[a-z_][a-z0-9_-]{0,62}")
_DEPLOYED_ID = re.compile(r"[1-9][0-9]{0,9}|[1-9][0-9]*")
Answer = Callable[[list[Any]], Sequence[Any]]


class Models:
    """ModelService. `models` has the versions of each model by its name: a dict of version ids."""

    is_locked = True

    def __init__(self, world: World, *, artifact_exists: Callable[[str], bool]):
        self._world = world
        self._artifact_exists = artifact_exists
        self.models: dict[str, dict[str, types.Model]] = {}
        self.endpoints: dict[str, types.Endpoint] = {}

    def upload_model(self, request: types.UploadModelRequest) -> LongRunning:
        model = request.model
        parent = self._world.canonical(request.parent)
        require_new(model, kind="Model")
        if not model.container_spec.image_uri:
            raise exceptions.InvalidArgument("Model.container_spec.image_uri must be set.")
        for alias in model.version_aliases:
            _check_alias(alias)
        if model.artifact_uri and not model.artifact_uri.startswith("gs://"):
            raise exceptions.InvalidArgument(f"Model.artifact_uri is no Cloud Storage URI: {model.artifact_uri}")
        if model.artifact_uri and not self._artifact_exists(model.artifact_uri):
            raise exceptions.InvalidArgument(f"Model.artifact_uri has no objects: {model.artifact_uri}")
        if request.parent_model:
            name = self._world.canonical(request.parent_model)
            find(self.models, name, kind="Model")
        else:
            if request.model_id and not _MODEL_ID.fullmatch(request.model_id):
                raise exceptions.InvalidArgument(f"Invalid model_id: {request.model_id}")
            name = f"{parent}/models/{request.model_id or self._world.new_id()}"
            if name in self.models:
                raise exceptions.AlreadyExists(f"The Model already exists: {name}")

        def finish() -> types.UploadModelResponse:
            versions = self.models.setdefault(name, {})
            version = str(max(map(int, versions), default=0) + 1)
            aliases = set(model.version_aliases) | (set() if versions else {"default"})
            stored = types.Model(model)
            stored.name, stored.version_id, stored.version_aliases, stored.etag = name, version, [], self._world.new_id()
            stored.create_time = versions["1"].create_time if "1" in versions else now()
            stored.update_time = stored.version_create_time = stored.version_update_time = now()
            resources = types.Model.DeploymentResourcesType
            stored.supported_deployment_resources_types = [resources.DEDICATED_RESOURCES]
            versions[version] = stored
            self._move_aliases(versions, version, aliases)
            return types.UploadModelResponse(model=name, model_version_id=version)

        return LongRunning(name, finish=finish, half_way=finish)

    def get_model(self, request: types.GetModelRequest) -> types.Model:
        return self._shown(self.find_version(request.name))

    def list_models(self, request: types.ListModelsRequest) -> types.ListModelsResponse:
        defaults = [self.find_version(name) for name in self.models]
        page, token = list_page(request, defaults, parent=f"{self._world.canonical(request.parent)}/models/")
        return types.ListModelsResponse(models=[self._shown(one) for one in page], next_page_token=token)

    def list_model_versions(self, request: types.ListModelVersionsRequest) -> types.ListModelVersionsResponse:
        name = self._world.canonical(request.name.partition("@")[0])
        versions = [self._shown(one) for one in find(self.models, name, kind="Model").values()]
        for one in versions:
            one.name = f"{name}@{one.version_id}"
        versions.sort(key=lambda one: int(one.version_id))
        page, token = list_page(request, versions[::-1])
        return types.ListModelVersionsResponse(models=page, next_page_token=token)

    def update_model(self, request: types.UpdateModelRequest) -> types.Model:
        model = self.find_version(request.model.name)
        check_labels(request.model.labels)
        merge(
            model, request.model, request.update_mask, allowed=("display_name", "description", "labels", "version_description")
        )
        model.update_time = model.version_update_time = now()
        return self._shown(model)

    def merge_version_aliases(self, request: types.MergeVersionAliasesRequest) -> types.Model:
        model = self.find_version(request.name)
        added = {alias for alias in request.version_aliases if not alias.startswith("-")}
        removed = {alias[1:] for alias in request.version_aliases if alias.startswith("-")}
        for alias in added | removed:
            _check_alias(alias)
        if "default" in removed - added:
            raise exceptions.InvalidArgument("The alias default cannot be removed; give it to another version.")
        model.version_aliases = [alias for alias in model.version_aliases if alias not in removed]
        self._move_aliases(self.models[model.name], model.version_id, added)
        return self._shown(model)

    def delete_model(self, request: types.DeleteModelRequest) -> LongRunning:
        name = self._world.canonical(request.name)
        for model in find(self.models, name, kind="Model").values():
            self._require_undeployed(model)
        return LongRunning(name, finish=lambda: _empty(self.models.pop(name)), is_exclusive=True)

    def delete_model_version(self, request: types.DeleteModelVersionRequest) -> LongRunning:
        model = self.find_version(request.name)
        self._require_undeployed(model)
        if "@" not in request.name:
            raise exceptions.InvalidArgument(f"The name has no version: {request.name}")
        if "default" in model.version_aliases:
            raise exceptions.FailedPrecondition(f"{request.name} is the default version and cannot be deleted.")
        return LongRunning(model.name, finish=lambda: _empty(self.models[model.name].pop(model.version_id)), is_exclusive=True)

    def find_version(self, name: str) -> types.Model:
        """The stored version that `models/ID`, `models/ID@2` or `models/ID@alias` names."""
        base, _, version = self._world.canonical(name).partition("@")
        versions = find(self.models, base, kind="Model")
        for model in versions.values():
            if (version or "default") in (model.version_id, *model.version_aliases):
                return model
        raise exceptions.NotFound(f"The Model version does not exist: {name}")

    @staticmethod
    def _move_aliases(versions: dict[str, types.Model], version: str, aliases: set[str]) -> None:
        for one in versions.values():
            kept = {alias for alias in one.version_aliases if alias not in aliases}
            one.version_aliases = sorted(kept | (aliases if one.version_id == version else set()))

    def _deployments(self, model: types.Model) -> list[types.DeployedModelRef]:
        return [
            types.DeployedModelRef(endpoint=endpoint.name, deployed_model_id=deployed.id)
            for endpoint in self.endpoints.values()
            for deployed in endpoint.deployed_models
            if (deployed.model, deployed.model_version_id) == (model.name, model.version_id)
        ]

    def _require_undeployed(self, model: types.Model) -> None:
        if found := self._deployments(model):
            raise exceptions.FailedPrecondition(f"The Model {model.name} is deployed at {found[0].endpoint}.")

    def _shown(self, model: types.Model) -> types.Model:
        shown = types.Model(model)
        shown.deployed_models = self._deployments(model)
        return shown


class Endpoints:
    """EndpointService. `endpoints` has each endpoint by its name."""

    is_locked = True

    def __init__(self, world: World, models: Models):
        self._world, self._models = world, models
        self.endpoints = models.endpoints

    def create_endpoint(self, request: types.CreateEndpointRequest) -> LongRunning:
        endpoint = types.Endpoint(request.endpoint)
        require_new(endpoint, kind="Endpoint")
        if endpoint.deployed_models or endpoint.traffic_split:
            raise exceptions.InvalidArgument("Endpoint.deployed_models and traffic_split are set by DeployModel.")
        parent = self._world.canonical(request.parent)
        endpoint.name = f"{parent}/endpoints/{request.endpoint_id or self._world.new_id()}"
        if endpoint.name in self.endpoints:
            raise exceptions.AlreadyExists(f"The Endpoint already exists: {endpoint.name}")

        def finish() -> types.Endpoint:
            endpoint.create_time = now()
            self._changed(endpoint)
            self.endpoints[endpoint.name] = endpoint
            return types.Endpoint(endpoint)

        return LongRunning(endpoint.name, finish=finish, half_way=finish)

    def get_endpoint(self, request: types.GetEndpointRequest) -> types.Endpoint:
        return types.Endpoint(self._find(request.name))

    def list_endpoints(self, request: types.ListEndpointsRequest) -> types.ListEndpointsResponse:
        page, token = list_page(request, self.endpoints.values(), parent=f"{self._world.canonical(request.parent)}/endpoints/")
        return types.ListEndpointsResponse(endpoints=page, next_page_token=token)

    def update_endpoint(self, request: types.UpdateEndpointRequest) -> types.Endpoint:
        endpoint = self._find(request.endpoint.name)
        if request.endpoint.etag and request.endpoint.etag != endpoint.etag:
            raise exceptions.Aborted(f"The etag of {endpoint.name} is {endpoint.etag}, not {request.endpoint.etag}.")
        check_labels(request.endpoint.labels)
        if "traffic_split" in [path.replace("trafficSplit", "traffic_split") for path in request.update_mask.paths]:
            self._world.require_idle(endpoint.name)
            _check_traffic(dict(request.endpoint.traffic_split), {one.id for one in endpoint.deployed_models})
        merge(
            endpoint, request.endpoint, request.update_mask, allowed=("display_name", "description", "labels", "traffic_split")
        )
        self._changed(endpoint)
        return types.Endpoint(endpoint)

    def deploy_model(self, request: types.DeployModelRequest) -> LongRunning:
        endpoint, deployed = self._find(request.endpoint), types.DeployedModel(request.deployed_model)
        self._world.require_idle(endpoint.name)
        model = self._models.find_version(deployed.model)
        _check_machines(deployed)
        taken = {one.id for one in endpoint.deployed_models}
        if deployed.id in taken or (deployed.id and not _DEPLOYED_ID.fullmatch(deployed.id)):
            raise exceptions.InvalidArgument(f"DeployedModel.id is taken or invalid: {deployed.id}")
        traffic = dict(request.traffic_split)
        if traffic:
            _check_traffic(traffic, taken | {"0"})
        deployed.id = deployed.id or self._world.new_id()
        deployed.model, deployed.model_version_id = model.name, model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        if model.explanation_spec and not deployed.explanation_spec and not deployed.disable_explanations:
            deployed.explanation_spec = model.explanation_spec

        def stay() -> None:
            deployed.create_time = now()
            endpoint.deployed_models.append(deployed)
            self._changed(endpoint)

        def finish() -> types.DeployModelResponse:
            stay()
            if traffic:
                endpoint.traffic_split = {deployed.id if one == "0" else one: share for one, share in traffic.items()}
            return types.DeployModelResponse(deployed_model=deployed)

        return LongRunning(endpoint.name, finish=finish, half_way=stay, is_exclusive=True)

    def undeploy_model(self, request: types.UndeployModelRequest) -> LongRunning:
        endpoint, unwanted = self._find(request.endpoint), request.deployed_model_id
        self._world.require_idle(endpoint.name)
        left = {one.id for one in endpoint.deployed_models} - {unwanted}
        if len(left) == len(endpoint.deployed_models):
            raise exceptions.NotFound(f"The Endpoint {endpoint.name} has no deployed model {unwanted}.")
        traffic = dict(request.traffic_split) or dict(endpoint.traffic_split)
        if left and traffic.get(unwanted):
            raise exceptions.FailedPrecondition(f"The deployed model {unwanted} still has {traffic[unwanted]}% of the traffic.")
        traffic.pop(unwanted, None)
        if left and request.traffic_split:
            _check_traffic(traffic, left)

        def finish() -> types.UndeployModelResponse:
            endpoint.deployed_models = [one for one in endpoint.deployed_models if one.id != unwanted]
            endpoint.traffic_split = traffic if left else {}
            self._changed(endpoint)
            return types.UndeployModelResponse()

        return LongRunning(endpoint.name, finish=finish, is_exclusive=True)

    def delete_endpoint(self, request: types.DeleteEndpointRequest) -> LongRunning:
        endpoint = self._find(request.name)
        self._world.require_idle(endpoint.name)
        if endpoint.deployed_models:
            raise exceptions.FailedPrecondition(f"The Endpoint {endpoint.name} has deployed models. Undeploy them first.")
        return LongRunning(endpoint.name, finish=lambda: _empty(self.endpoints.pop(endpoint.name)), is_exclusive=True)

    def _find(self, name: str) -> types.Endpoint:
        return find(self.endpoints, self._world.canonical(name), kind="Endpoint")

    def _changed(self, endpoint: types.Endpoint) -> None:
        endpoint.update_time, endpoint.etag = now(), self._world.new_id()


class Predictions:
    """PredictionService: routed by the traffic split, each model taking its turns, and answered by the test's functions."""

    is_locked = False  # a model takes its time

    def __init__(self, world: World, models: Models):
        self._world, self._models = world, models
        self._credits: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.answers: dict[str, Answer] = {}
        self.explanations: dict[str, Answer] = {}

    def predict(self, request: types.PredictRequest) -> types.PredictResponse:
        size = type(request).pb(request).ByteSize()
        if size > MAX_REQUEST_BYTES:
            raise exceptions.InvalidArgument(f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes.")
        deployed, model = self._route(request.endpoint)
        response = types.PredictResponse(
            deployed_model_id=deployed.id,
            model=model.name,
            model_version_id=model.version_id,
            model_display_name=model.display_name,
        )
        # Not by the constructor: proto-plus does not take protobuf's own values in a list.
        type(response).pb(response).predictions.extend(_ask(self.answers, model, type(request).pb(request).instances))
        return response

    def raw_predict(self, request: types.RawPredictRequest) -> httpbody_pb2.HttpBody:
        try:
            instances = json.loads(request.http_body.data)["instances"]
        except (ValueError, KeyError, TypeError) as error:
            raise exceptions.InvalidArgument(f"The body is no JSON with instances: {error}") from error
        sent = types.PredictRequest(endpoint=request.endpoint)
        type(sent).pb(sent).instances.extend(json_format.ParseDict(one, struct_pb2.Value()) for one in instances)
        response = self.predict(sent)
        body = {"predictions": json_format.MessageToDict(type(response).pb(response)).get("predictions", [])}
        return httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(body).encode())

    def explain(self, request: types.ExplainRequest) -> types.ExplainResponse:
        deployed, model = self._route(request.endpoint, deployed_model_id=request.deployed_model_id)
        if not deployed.explanation_spec:
            raise exceptions.FailedPrecondition(f"The deployed model {deployed.id} has no explanation spec.")
        instances = type(request).pb(request).instances
        explanations = [types.Explanation(**one) for one in _call(self.explanations, model, instances)]
        response = types.ExplainResponse(explanations=explanations, deployed_model_id=deployed.id)
        type(response).pb(response).predictions.extend(_ask(self.answers, model, instances))
        return response

    def _route(self, name: str, *, deployed_model_id: str = "") -> tuple[types.DeployedModel, types.Model]:
        with self._world.lock:
            endpoint = find(self._models.endpoints, self._world.canonical(name), kind="Endpoint")
            deployed = {one.id: one for one in endpoint.deployed_models}
            shares = {one: share for one, share in endpoint.traffic_split.items() if share}
            if deployed_model_id:
                find(deployed, deployed_model_id, kind="deployed model")
            elif not shares:
                raise exceptions.FailedPrecondition(f"The Endpoint {endpoint.name} has no deployed model with traffic.")
            else:
                # Weighted round robin: who waits longest by its share comes next, so that 10 of 100 is every tenth.
                waiting = self._credits[endpoint.name]
                for one in [one for one in waiting if one not in shares]:
                    del waiting[one]
                waiting.update(shares)
                deployed_model_id = max(waiting, key=waiting.__getitem__)
                waiting[deployed_model_id] -= 100
            chosen = deployed[deployed_model_id]
            return chosen, self._models.models[chosen.model][chosen.model_version_id]


def _call(functions: dict[str, Answer], model: types.Model, instances: Any) -> Sequence[Any]:
    """The function of the model's artifact URI, of a folder above it, or of "" for every other model."""
    uri = model.artifact_uri.rstrip("/")
    while uri not in functions and uri:
        uri = uri.rpartition("/")[0]
    if uri not in functions:
        raise exceptions.FailedPrecondition(f"The test gives no answers of {model.artifact_uri}. Set them in the stand-in.")
    return functions[uri]([json_format.MessageToDict(one) for one in instances])


def _ask(functions: dict[str, Answer], model: types.Model, instances: Any) -> list[struct_pb2.Value]:
    return [json_format.ParseDict(one, struct_pb2.Value()) for one in _call(functions, model, instances)]


def _check_alias(alias: str) -> None:
    if not _ALIAS.fullmatch(alias):
        raise exceptions.InvalidArgument(f"Invalid version alias {alias!r}: {_ALIAS.pattern}")


def _check_traffic(traffic: dict[str, int], known: set[str]) -> None:
    if unknown := set(traffic) - known:
        raise exceptions.InvalidArgument(f"traffic_split names deployed models that are not there: {sorted(unknown)}")
    if min(traffic.values(), default=0) < 0 or (traffic and sum(traffic.values()) != 100):
        raise exceptions.InvalidArgument(f"traffic_split must sum to 100: {traffic}")


def _check_machines(deployed: types.DeployedModel) -> None:
    if "dedicated_resources" not in deployed:
        raise exceptions.InvalidArgument("DeployedModel.dedicated_resources must be set: the Model supports no others.")
    resources = deployed.dedicated_resources
    if not resources.machine_spec.machine_type or resources.min_replica_count < 1:
        raise exceptions.InvalidArgument("dedicated_resources needs a machine_type and a min_replica_count of at least 1.")
    if resources.max_replica_count and resources.max_replica_count < resources.min_replica_count:
        raise exceptions.InvalidArgument("max_replica_count is less than min_replica_count.")
    if bool(resources.machine_spec.accelerator_type) != bool(resources.machine_spec.accelerator_count):
        raise exceptions.InvalidArgument("accelerator_type and accelerator_count must be set together.")


def _empty(_: Any) -> empty_pb2.Empty:
    return empty_pb2.Empty()
