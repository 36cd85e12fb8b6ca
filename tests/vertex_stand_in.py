"""A stand-in of Google Cloud that the real SDK talks to, with no change of our code: Vertex AI over gRPC, Storage over HTTPS.

In a test, where `google_cloud` is also set for this process (environment, fresh SDK):

    import vertex_stand_in
    google_cloud = vertex_stand_in.google_cloud

    def test_push_...(google_cloud):
        google_cloud.storage.create_bucket("bucket")                 # a folder: google_cloud.storage.path("gs://bucket/a/b")
        google_cloud.answers["gs://bucket/model"] = lambda instances: [{"label": "a"} for one in instances]
        google_cloud.faults.append(("DeployModel", exceptions.ResourceExhausted("quota of n1-standard-4")))
        aiplatform.init(project=google_cloud.project, location="us-central1")
        ...
        assert google_cloud.sent("DeployModel")[0].deployed_model.dedicated_resources.min_replica_count == 1

`subprocess.run(command, env={**os.environ, **google_cloud.environment})` gives a child process the same cloud.
`with VertexStandIn(folder) as stand_in` is the same without the fixture: only `environment` leads to it.

What a test looks at and turns; see `VertexStandIn` for each:
  `requests`, `sent(method)`  every request as its proto, in order, by the name of its RPC
  `faults`                    (method, exception or `Fault`), each used once, by the next request of that method
  `answers`, `explanations`   by artifact URI, a folder above it, or "" for all: a function from instances to answers
  `models`, `endpoints`, `custom_jobs`, `batch_jobs`, `pipeline_jobs`   what there is now, by resource name
  `operation_seconds`, `answer_seconds`   by RPC; none by default: operations are done in their first answer
  `end_operations()`          ends the operations that are under way, however long they would take
  `jobs.run_custom_job`, `jobs.run_batch_job`, `pipelines.run_pipeline_job`   functions that a created job runs in a thread
  `jobs.wait_seconds`, `jobs.finish_at_once`   keep clients quick that sleep 5 or 30 s between two looks at a job
  `pipelines.set_pipeline`, `pipelines.set_task`   move a pipeline job along
  `network.https`, `rpcs`     where a test adds an answer of a service that is not here
  `unknown`                   RPCs that had no answer: UNIMPLEMENTED, and a line in the log

Facts that the stand-in keeps to, as the service does: names come back with the project's number; a prediction goes to a
deployed model by the traffic split and can name none (`PredictRequest` has no field for it, in v1 or v1beta1; `ExplainRequest`
has `deployed_model_id`), so a model without traffic cannot be asked; the SDK's clients neither retry nor time out on their own.
"""

import concurrent.futures
import dataclasses
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from google.api_core import exceptions
from google.cloud import aiplatform_v1, aiplatform_v1beta1
from google.cloud.resourcemanager_v3.types import GetProjectRequest
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2
from google_cloud_network import HttpsAnswer, HttpsRequest, Network, authority
from storage_stand_in import HOSTS, StorageStandIn
from vertex_jobs import Jobs, Pipelines, Projects
from vertex_serving import Answer, Endpoints, Models, Predictions
from vertex_world import LongRunning, Message, World

PROJECT = "test-project"
PROJECT_NUMBER = "123456789012"
_PACKAGES = {"v1": aiplatform_v1.types, "v1beta1": aiplatform_v1beta1.types}
_VERTEX = re.compile(r"/google\.cloud\.aiplatform\.(?P<version>\w+)\.(?P<service>\w+)/(?P<method>\w+)")
_REGION = re.compile(r"locations/([^/]+)")
_RAW_PREDICT = r"[\w-]+-aiplatform\.googleapis\.com/v1/(?P<endpoint>projects/[^/]+/locations/[^/]+/endpoints/[^/:]+):rawPredict"
_CAPITAL = re.compile(r"(?<!^)(?=[A-Z])")
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fault:
    """An error and when it comes.

    Attributes:
      error: what the client gets; of `google.api_core.exceptions`, one with a gRPC code.
      when: `refused`: nothing was done. `answer_lost`: all was done, and the client gets the error in place of the answer.
        `operation`: the long-running operation was accepted and ends with the error, nothing done. `half_way`: the same, but
        what was deployed stays at the endpoint without traffic, and what was uploaded or created stays.
    """

    error: exceptions.GoogleAPICallError
    when: str = "refused"

    def __post_init__(self):
        if self.error.grpc_status_code is None or self.when not in ("refused", "answer_lost", "operation", "half_way"):
            raise ValueError(f"Expected an error with a gRPC code, and a known moment. Received: {self!r}")


@dataclasses.dataclass
class _Operation:
    """A long-running operation: its answer so far, and its work until that is done at the time `due`."""

    proto: operations_pb2.Operation
    version: str
    due: float
    work: LongRunning
    fault: Fault | None


class VertexStandIn:
    """See the module. A context manager, for one use.

    Attributes:
      project, number: id and number of the one project; names may come with either and go with the number.
      network: the network below, with `environment`, `hosts`, `refused`, `is_down` and `https`.
      storage: `create_bucket(name)`, `path(uri)`, `permissions`, `fault`.
      requests: every request, as (name of the RPC, message of its own API version).
      faults: pairs of the name of an RPC and the exception or `Fault` for its next request; `GetOperation` is one too.
      rpcs: `/package.Service/Method` -> (type of the request, function from the request to the answer).
      unknown: the paths of RPCs that had no answer.
      answer_seconds: how long the answer of an RPC stays away after its work is done, by its name; for deadlines. The end of
        the stand-in ends it.
      operation_seconds: how long the operation of an RPC takes, by its name; its work is done at its end.
      jobs, pipelines: what runs and moves jobs, see `vertex_jobs`.
    """

    def __init__(self, folder: Path, *, project: str = PROJECT):
        """Makes everything but threads.

        Args:
          folder: an existing folder of the test's own, for the buckets and the key file.
          project: id of the project.
        """
        self.project, self.number = project, PROJECT_NUMBER
        self.requests: list[tuple[str, Any]] = []
        self.faults: list[tuple[str, exceptions.GoogleAPICallError | Fault]] = []
        self.unknown: list[str] = []
        self.answer_seconds: dict[str, float] = {}
        self.operation_seconds: dict[str, float] = {}
        self._has_ended = threading.Event()
        self._operations: dict[str, _Operation] = {}
        self._world = World(project, PROJECT_NUMBER)
        self.storage = StorageStandIn(folder / "buckets")
        self._models = Models(self._world, artifact_exists=self.storage.exists)
        self._predictions = Predictions(self._world, self._models)
        self.jobs = Jobs(self._world, self._models)
        self.pipelines = Pipelines(self._world)
        self._services = {
            "ModelService": self._models,
            "EndpointService": Endpoints(self._world, self._models),
            "PredictionService": self._predictions,
            "JobService": self.jobs,
            "PipelineService": self.pipelines,
        }
        operations = "/google.longrunning.Operations"
        self.rpcs: dict[str, tuple[Any, Callable[[Any], Message]]] = {
            "/google.cloud.resourcemanager.v3.Projects/GetProject": (GetProjectRequest, Projects(self._world).get_project),
            f"{operations}/GetOperation": (operations_pb2.GetOperationRequest, self._get_operation),
            f"{operations}/CancelOperation": (operations_pb2.CancelOperationRequest, self._cancel_operation),
        }
        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(16),
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        self._server.add_generic_rpc_handlers([_Handlers(self)])
        credentials = grpc.ssl_server_credentials([(authority().server_key_pem, authority().server_pem)])
        self.network = Network(folder, project=project, grpc_port=self._server.add_secure_port("127.0.0.1:0", credentials))
        self.network.https.extend([(HOSTS, self.storage.answer), (_RAW_PREDICT, self._raw_predict_over_https)])

    def __enter__(self) -> "VertexStandIn":
        self._server.start()
        self.network.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._has_ended.set()
        self.network.stop()
        self._server.stop(1.0)  # in the background: at once, it would tell clients that are still there of an error

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a process here."""
        return self.network.environment

    @property
    def answers(self) -> dict[str, Answer]:
        """By artifact URI, a folder above it, or "" for every model: a function from instances to predictions, as JSON values.

        It may raise an exception of `google.api_core.exceptions`, which the client gets.
        """
        return self._predictions.answers

    @property
    def explanations(self) -> dict[str, Answer]:
        """The same for Explain: a function from instances to the arguments of `types.Explanation`, for each instance."""
        return self._predictions.explanations

    @property
    def models(self) -> dict[str, dict[str, aiplatform_v1.types.Model]]:
        """The versions of each model, by resource name and version id."""
        self._settle()
        return self._models.models

    @property
    def endpoints(self) -> dict[str, aiplatform_v1.types.Endpoint]:
        """The endpoints by resource name."""
        self._settle()
        return self._models.endpoints

    @property
    def custom_jobs(self) -> dict[str, aiplatform_v1.types.CustomJob]:
        """The custom jobs by resource name."""
        return self.jobs.custom_jobs

    @property
    def batch_jobs(self) -> dict[str, aiplatform_v1.types.BatchPredictionJob]:
        """The batch prediction jobs by resource name."""
        return self.jobs.batch_jobs

    @property
    def pipeline_jobs(self) -> dict[str, aiplatform_v1.types.PipelineJob]:
        """The pipeline jobs by resource name."""
        return self.pipelines.pipeline_jobs

    def sent(self, method: str) -> list[Any]:
        """The requests of one RPC, in order."""
        return [request for name, request in list(self.requests) if name == method]

    def end_operations(self) -> None:
        """Does the work of all operations that are under way."""
        with self._world.lock:
            for operation in self._operations.values():
                operation.due = 0.0
            self._settle()

    def answer(self, path: str, content: bytes, *, host: str = "", is_authorized: bool = True) -> bytes:
        """Answers one gRPC request.

        Args:
          path: `/package.Service/Method`.
          content: the request, serialized.
          host: that the client wanted, to tell one region's service from another's; empty for any.
          is_authorized: whether a bearer token came with it.

        Returns:
          The answer, serialized.

        Raises:
          exceptions.GoogleAPICallError: the error that the client gets.
        """
        request_type, function, version = self._find(path)
        method = path.rpartition("/")[2]
        request = (
            request_type.deserialize(content) if hasattr(request_type, "deserialize") else request_type.FromString(content)
        )
        with self._world.lock:
            self.requests.append((method, request))
            fault = self._take_fault(method)
        if not is_authorized:
            raise exceptions.Unauthenticated("Request is missing required authentication credential.")
        if fault and fault.when == "refused":
            raise fault.error
        if version and host:
            _check_region(request, host)
        self._settle()
        answer = function(request)
        if isinstance(answer, LongRunning):
            answer = self._start(method, answer, version=version, fault=fault)
        self._has_ended.wait(self.answer_seconds.get(method, 0.0))
        if fault and fault.when == "answer_lost":
            raise fault.error
        return type(answer).serialize(answer) if hasattr(type(answer), "serialize") else answer.SerializeToString()

    def _find(self, path: str) -> tuple[Any, Callable[[Any], Message], str]:
        """The type of the request, its function, and Vertex AI's version, empty for another service."""
        if path in self.rpcs:
            return *self.rpcs[path], ""
        match = _VERTEX.fullmatch(path)
        if match and match["version"] in _PACKAGES:
            service = self._services.get(match["service"])
            function = getattr(service, _CAPITAL.sub("_", match["method"]).lower(), None)
            if function:
                name = f"{match['method']}Request"
                v1_type = getattr(aiplatform_v1.types, name)

                def call(request: Message) -> Message:
                    # The versions' messages have the same numbers for the fields that both have.
                    request = request if isinstance(request, v1_type) else v1_type.deserialize(type(request).serialize(request))
                    if not service.is_locked:
                        return function(request)
                    with self._world.lock:
                        return function(request)

                return getattr(_PACKAGES[match["version"]], name), call, match["version"]
        self.unknown.append(path)
        _LOGGER.error("The stand-in of Google Cloud does not know %s", path)
        raise exceptions.MethodNotImplemented(f"the stand-in does not know {path}")

    def _take_fault(self, method: str) -> Fault | None:
        for position, (name, fault) in enumerate(self.faults):
            if name == method:
                del self.faults[position]
                return fault if isinstance(fault, Fault) else Fault(fault)
        return None

    def _start(self, method: str, work: LongRunning, *, version: str, fault: Fault | None) -> operations_pb2.Operation:
        with self._world.lock:
            name = f"{work.resource}/operations/{self._world.new_id()}"
            operation = _Operation(
                proto=operations_pb2.Operation(name=name),
                version=version,
                due=time.monotonic() + self.operation_seconds.get(method, 0.0),
                work=work,
                fault=fault if fault and fault.when in ("operation", "half_way") else None,
            )
            metadata = getattr(_PACKAGES[version], f"{method}OperationMetadata", None)
            if metadata:
                operation.proto.metadata.CopyFrom(_pack(metadata(), version))
            self._operations[name] = operation
            if work.is_exclusive:
                self._world.busy[work.resource] = name
            self._settle()
            return _copy(operation.proto)

    def _settle(self) -> None:
        """Does the work of the operations whose time has come."""
        with self._world.lock:
            for operation in list(self._operations.values()):
                if not operation.proto.done and operation.due <= time.monotonic():
                    self._end(operation, operation.fault.error if operation.fault else None)

    def _end(self, operation: _Operation, error: exceptions.GoogleAPICallError | None) -> None:
        work = operation.work
        try:
            if error is None:
                operation.proto.response.CopyFrom(_pack(work.finish(), operation.version))
            elif operation.fault and operation.fault.when == "half_way":
                work.half_way()
        except exceptions.GoogleAPICallError as failure:
            error = failure
        if error is not None:
            operation.proto.error.CopyFrom(status_pb2.Status(code=error.grpc_status_code.value[0], message=error.message))
        operation.proto.done = True
        if self._world.busy.get(work.resource) == operation.proto.name:
            del self._world.busy[work.resource]

    def _get_operation(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:
        with self._world.lock:
            return _copy(self._find_operation(request.name).proto)

    def _cancel_operation(self, request: operations_pb2.CancelOperationRequest) -> empty_pb2.Empty:
        with self._world.lock:
            operation = self._find_operation(request.name)
            if not operation.proto.done:
                self._end(operation, exceptions.Cancelled("The operation was cancelled."))
            return empty_pb2.Empty()

    def _find_operation(self, name: str) -> _Operation:
        name = self._world.canonical(name)
        if name not in self._operations:
            raise exceptions.NotFound(f"The operation does not exist: {name}")
        return self._operations[name]

    def _raw_predict_over_https(self, request: HttpsRequest) -> HttpsAnswer:
        """The SDK sends RawPredict as plain HTTPS."""
        endpoint = re.fullmatch(_RAW_PREDICT, request.host + request.path)["endpoint"]
        sent = aiplatform_v1.types.RawPredictRequest(endpoint=endpoint, http_body={"data": request.body})
        try:
            content = self.answer(
                "/google.cloud.aiplatform.v1.PredictionService/RawPredict",
                type(sent).serialize(sent),
                is_authorized="authorization" in request.headers,
            )
        except exceptions.GoogleAPICallError as error:
            return HttpsAnswer.error(error.code, error.message)
        return HttpsAnswer(200, httpbody_pb2.HttpBody.FromString(content).data)


class _Handlers(grpc.GenericRpcHandler):
    """Hands every path to the stand-in, as bytes: which type they are depends on the path."""

    def __init__(self, stand_in: VertexStandIn):
        self._stand_in = stand_in

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        is_authorized = any(
            key == "authorization" and value.startswith("Bearer ") for key, value in details.invocation_metadata
        )

        def handle(content: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                # gRPC's public interface does not tell the host.
                host = context._rpc_event.call_details.host.decode()
                return self._stand_in.answer(details.method, content, host=host, is_authorized=is_authorized)
            except exceptions.GoogleAPICallError as error:
                context.abort(error.grpc_status_code or grpc.StatusCode.UNKNOWN, error.message)
            except Exception as error:
                _LOGGER.exception("The stand-in of Google Cloud failed at %s", details.method)
                context.abort(grpc.StatusCode.INTERNAL, f"the stand-in failed: {error!r}")

        return grpc.unary_unary_rpc_method_handler(handle)


def _check_region(request: Message, host: str) -> None:
    """Refuses a request that came to another region's host, as a client with a forgotten `api_endpoint` sends it."""
    message = type(request).pb(request)
    for field in ("parent", "name", "endpoint", "model"):
        value = getattr(message, field, "")
        value = value if isinstance(value, str) else getattr(value, "name", "")
        if match := _REGION.search(value):
            if not host.startswith(f"{match[1]}-aiplatform."):
                raise exceptions.InvalidArgument(f"{value} is not in the region of {host}.")
            return


def _pack(message: Message, version: str) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(type(message).pb(message) if hasattr(type(message), "pb") else message)
    packed.type_url = packed.type_url.replace("google.cloud.aiplatform.v1.", f"google.cloud.aiplatform.{version}.")
    return packed


def _copy(message: operations_pb2.Operation) -> operations_pb2.Operation:
    copy = operations_pb2.Operation()
    copy.CopyFrom(message)
    return copy


def reset_sdk() -> None:
    """Makes the SDK forget project, credentials and transport, where it is loaded: they last as long as the process."""
    if aiplatform := sys.modules.get("google.cloud.aiplatform"):
        aiplatform.initializer.global_config.__init__()


@pytest.fixture
def google_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VertexStandIn]:
    """The stand-in, with this process's environment leading there."""
    (folder := tmp_path / "google_cloud").mkdir()
    with VertexStandIn(folder) as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        reset_sdk()
        yield stand_in
        reset_sdk()
