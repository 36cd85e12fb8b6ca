"""How Google Cloud is asked: what is asked again after a pause, how operations are waited for, and errors in one line.

The SDK's clients neither repeat a request nor give up waiting on their own. Called by what speaks with Vertex AI.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import google.auth.exceptions
from google.api_core import exceptions, operation, retry
from google.api_core.future import polling
from google.longrunning import operations_pb2

from data.errors import InputError

Made = TypeVar("Made")

CALL_SECONDS = 120.0  # of one request with its repetitions
OPERATION_SECONDS = 2 * 3600.0  # Vertex AI's own limit of a deployment
_MAX_MESSAGE = 400  # characters of Google's own words
_NO_TOKEN = "Getting metadata from plugin failed"  # gRPC's words where a token cannot be had,
NO_CONNECTION = ("Max retries exceeded", "Connection aborted", "timed out")  # with these where that is for want of a network
_NO_ADDRESS = ("failed to connect to all addresses", "DNS resolution failed")  # gRPC's words without a network
_TRANSIENT = (
    exceptions.ServiceUnavailable,
    exceptions.GatewayTimeout,
    exceptions.TooManyRequests,  # of requests in a minute; what is left after the last repetition is a quota
    exceptions.Aborted,
)


class _StillRunningError(Exception):
    """An operation on a resource has not ended."""


def is_transient(error: BaseException) -> bool:
    """Tells whether the same request may be answered a little later."""
    return isinstance(error, _TRANSIENT) and not _is_refused_token(str(error))


def is_unreachable(error: BaseException) -> bool:
    """Tells whether a request did not leave this machine: no network, no proxy, or no token."""
    return any(words in str(error) for words in (_NO_TOKEN, *_NO_ADDRESS))


def _is_refused_token(message: str) -> bool:
    return _NO_TOKEN in message and not any(words in message for words in NO_CONNECTION)


RETRY = retry.Retry(predicate=is_transient, initial=1.0, maximum=20.0, multiplier=2.0, timeout=90.0)
POLLING = polling.DEFAULT_POLLING.with_timeout(OPERATION_SECONDS)


def repeated() -> dict[str, Any]:
    """Returns the options of a request that may be repeated as it is."""
    return {"retry": RETRY, "timeout": CALL_SECONDS}


def once() -> dict[str, Any]:
    """Returns the options of a request whose repetition must first look whether it was done."""
    return {"retry": None, "timeout": CALL_SECONDS}


def until_made(find_or_make: Callable[[], Made]) -> Made:
    """Repeats an attempt to find or make something, after a transient error and while another request is making it."""
    is_being_made = retry.if_exception_type(exceptions.AlreadyExists)
    return POLLING.with_predicate(is_being_made)(RETRY(find_or_make))()


def finish(running: operation.Operation, doing: str) -> Any:
    """Waits for an operation, two hours at most.

    Args:
      running: as the request returned it.
      doing: see `explained`.

    Returns:
      Its response.

    Raises:
      InputError, RuntimeError: its own error, explained, so that it is not taken for one of the request, which is repeated.
    """
    with explaining(doing):
        return running.result(polling=POLLING)


def wait_for_operations(client: Any, name: str, report: Callable[[str], None]) -> bool:
    """Waits for what an interrupted command, or another one, has begun on a resource; it need not exist yet.

    Args:
      client: of a service of Vertex AI.
      name: of the resource.
      report: takes a sentence on what is waited for.

    Returns:
      Whether there was anything to wait for.
    """
    reported: set[str] = set()

    def attempt() -> None:
        running = set(running_operations(client, name))
        if running - reported:
            report(f"Waiting for what is under way already: {', '.join(sorted(running - reported))}")
            reported.update(running)
        if running:
            raise _StillRunningError(f"{', '.join(sorted(running))} still running")

    POLLING.with_predicate(retry.if_exception_type(_StillRunningError))(attempt)()
    return bool(reported)


def running_operations(client: Any, name: str) -> list[str]:
    """Returns the names of what is under way on a resource, which need not exist yet."""
    running, request = [], operations_pb2.ListOperationsRequest(name=name)
    while True:
        try:
            response = client.list_operations(request, **repeated())
        # The resource is not there yet; or nobody keeps a list, and Vertex AI itself refuses what is too early.
        except (exceptions.NotFound, exceptions.MethodNotImplemented):
            return []
        running += [one.name for one in response.operations if not one.done]
        if not response.next_page_token:
            return running
        request.page_token = response.next_page_token


@contextlib.contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Raises errors of Google's libraries as `explained` gives them."""
    try:
        yield
    except (exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, TimeoutError) as error:
        raise explained(error, doing) from error


def explained(error: BaseException, doing: str) -> Exception:
    """Turns an error of Google's libraries into one line for the user.

    Args:
      error: as raised.
      doing: what was asked for, such as "deploy version 4".

    Returns:
      `InputError` where credentials, permissions, quota, or a name or setting are at fault, else `RuntimeError`.
    """
    if isinstance(error, exceptions.RetryError) and error.cause is not None:
        error = error.cause
    message = " ".join(str(getattr(error, "message", "") or error).split())[:_MAX_MESSAGE].rstrip(".")
    if isinstance(error, google.auth.exceptions.GoogleAuthError | exceptions.Unauthorized) or _is_refused_token(message):
        return InputError(
            f"Expected valid credentials to {doing}. Received: {message}. Run `gcloud auth application-default login`, or "
            "set GOOGLE_APPLICATION_CREDENTIALS to a service account's key file."
        )
    if isinstance(error, exceptions.Forbidden):
        return InputError(
            f"Expected permission to {doing}. Received: {message}. Give the account the role roles/aiplatform.user on the "
            "project."
        )
    if isinstance(error, exceptions.NotFound):
        return InputError(
            f"Expected all that it takes to {doing}. Received: {message}. Compare project, region, image and bucket with "
            "what is there."
        )
    if isinstance(error, exceptions.TooManyRequests):
        return InputError(
            f"Expected enough quota to {doing}. Received: {message}. Ask for more on the console's page of quotas, or take "
            "another machine type or fewer replicas."
        )
    if isinstance(error, exceptions.InvalidArgument):
        return InputError(f"Expected settings that Vertex AI takes to {doing}. Received: {message}. Mend them.")
    if isinstance(error, TimeoutError):
        message = f"nothing in {OPERATION_SECONDS / 3600:.0f} hours"
    return RuntimeError(
        f"Expected Vertex AI to {doing}. Received: {message or type(error).__name__}. Repeat the command; it goes on from "
        "what is there."
    )
