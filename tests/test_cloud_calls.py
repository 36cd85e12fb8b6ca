import json

import google.auth.exceptions
import pytest
import vertex_stand_in
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import EndpointServiceClient
from google_cloud_network import HttpsAnswer
from vertex_stand_in import Fault

from data.errors import InputError
from pipeline import cloud_calls
from pipeline.cloud_calls import explained, explaining, is_transient, repeated

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

NO_TOKEN = exceptions.ServiceUnavailable("Getting metadata from plugin failed with error: invalid_grant")
CREDENTIALS = "Expected valid credentials to sing. Received: {}. Run `gcloud auth application-default login`, or set "


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            exceptions.PermissionDenied("no\nway."),
            InputError,
            "Expected permission to sing. Received: no way. Give the account",
        ),
        (
            exceptions.NotFound("gone"),
            InputError,
            "Expected all that it takes to sing. Received: gone. Compare project, region",
        ),
        (exceptions.ResourceExhausted("quota"), InputError, "Expected enough quota to sing. Received: quota. Ask for more"),
        (
            exceptions.InvalidArgument("a"),
            InputError,
            "Expected settings that Vertex AI takes to sing. Received: a. Mend them.",
        ),
        (exceptions.Unauthenticated("old"), InputError, CREDENTIALS.format("old")),
        (NO_TOKEN, InputError, CREDENTIALS.format(NO_TOKEN.message)),
        (google.auth.exceptions.RefreshError("x"), InputError, CREDENTIALS.format("x")),
        (
            exceptions.FailedPrecondition("f"),
            RuntimeError,
            "Expected Vertex AI to sing. Received: f. Repeat the command; it goes",
        ),
        (exceptions.InternalServerError(""), RuntimeError, "Expected Vertex AI to sing. Received: 500. Repeat the command"),
        (TimeoutError(), RuntimeError, "Expected Vertex AI to sing. Received: nothing in 2 hours. Repeat the command"),
        (exceptions.RetryError("Timeout", exceptions.TooManyRequests("q")), InputError, "Expected enough quota to sing. Rec"),
        (exceptions.RetryError("Timeout", None), RuntimeError, "Expected Vertex AI to sing. Received: Timeout"),
    ],
)
def test_explained_says_what_to_do_in_one_line(error, kind, text):
    found = explained(error, "sing")

    assert type(found) is kind
    assert str(found).startswith(text)
    assert len(str(found).splitlines()) == 1


def test_explaining_lets_other_errors_pass():
    with pytest.raises(KeyError), explaining("sing"):
        raise KeyError
    with pytest.raises(InputError) as caught, explaining("sing"):
        raise exceptions.NotFound("gone")
    assert isinstance(caught.value.__cause__, exceptions.NotFound)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ServiceUnavailable("x"), True),
        (exceptions.DeadlineExceeded("x"), True),
        (exceptions.ResourceExhausted("x"), True),
        (exceptions.Aborted("x"), True),
        (NO_TOKEN, False),
        (exceptions.InternalServerError("x"), False),
        (exceptions.PermissionDenied("x"), False),
        (ValueError("x"), False),
    ],
)
def test_is_transient_tells_what_may_pass(error, expected):
    assert is_transient(error) == expected


def _list(cloud):
    client = EndpointServiceClient(client_options={"api_endpoint": "us-central1-aiplatform.googleapis.com"})
    return list(client.list_endpoints(parent=f"projects/{cloud.project}/locations/us-central1", **repeated()))


def test_repeated_asks_again_with_growing_pauses_and_then_gives_up(google_cloud, monkeypatch):
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.1).with_timeout(60))
    google_cloud.faults.extend([("ListEndpoints", exceptions.ServiceUnavailable("down"))] * 3)

    assert _list(google_cloud) == []
    assert len(google_cloud.sent("ListEndpoints")) == 4

    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_timeout(0.5))
    google_cloud.faults.extend([("ListEndpoints", exceptions.ServiceUnavailable("down"))] * 1000)
    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to list. Received: down\. "), explaining("list"):
        _list(google_cloud)
    assert len(google_cloud.sent("ListEndpoints")) - 4 < 100  # on a slow machine it is one


def test_repeated_does_not_wait_for_an_answer_for_ever(google_cloud, monkeypatch):
    monkeypatch.setattr(cloud_calls, "CALL_SECONDS", 0.3)
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_timeout(0.3))
    google_cloud.answer_seconds["ListEndpoints"] = 600.0

    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to list. Received: .*Deadline Exceeded"), explaining("list"):
        _list(google_cloud)


def test_explaining_says_where_a_login_is_no_longer_good(google_cloud, monkeypatch, tmp_path):
    """Without a repetition: what gRPC calls unavailable then does not pass."""
    login = {"type": "authorized_user", "client_id": "1", "client_secret": "s", "refresh_token": "old"}
    (tmp_path / "login.json").write_text(json.dumps(login))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "login.json"))
    refusal = HttpsAnswer(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."})
    google_cloud.network.https.append((r"oauth2\.googleapis\.com/token", lambda request: refusal))

    with pytest.raises(InputError, match=r"Expected valid credentials to list. Received: .*revoked"), explaining("list"):
        _list(google_cloud)

    assert google_cloud.sent("ListEndpoints") == []


def test_faults_of_an_operation_are_not_taken_for_the_request_s(google_cloud):
    client = EndpointServiceClient(client_options={"api_endpoint": "us-central1-aiplatform.googleapis.com"})
    google_cloud.faults.append(("CreateEndpoint", Fault(exceptions.ServiceUnavailable("later"), "operation")))
    making = client.create_endpoint(
        parent=f"projects/{google_cloud.project}/locations/us-central1", endpoint={"display_name": "x"}, **cloud_calls.once()
    )

    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to make it. Received: later\.") as caught:
        cloud_calls.finish(making, "make it")

    assert not is_transient(caught.value)


def test_is_transient_tells_a_lost_connection_from_a_refused_token():
    lost = exceptions.ServiceUnavailable("Getting metadata from plugin failed with error: Max retries exceeded with url")

    assert is_transient(lost)
    assert not is_transient(NO_TOKEN)
    assert type(explained(lost, "sing")) is RuntimeError
