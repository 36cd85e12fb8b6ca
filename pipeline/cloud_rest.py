"""Google Cloud's REST APIs, as far as a check asks them: who asks, the answer or why there is none, and what comes of it.

Called by `pipeline.cloud_check`, `pipeline.cloud_access` and `pipeline.cloud_quota`.
"""

import urllib.parse
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import google.auth
import google.auth.exceptions
import google.oauth2.credentials
import requests
import requests.adapters
import urllib3
from google.auth.transport.requests import AuthorizedSession, Request

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_TIMEOUT_SECONDS = 20.0  # of one attempt
_REPEATED_STATUS = (429, 500, 502, 503, 504)
_NUM_REPETITIONS = 3
LOGIN = "gcloud auth application-default login"


class NoCredentialsError(RuntimeError):
    """There are no application default credentials, or they are no longer good; the message says what to do."""


class UnreachableError(RuntimeError):
    """Google Cloud does not answer at all."""


class RefusedError(RuntimeError):
    """An API refused a request.

    Attributes:
      status: of HTTP.
      disabled_service: the API that is not enabled, such as compute.googleapis.com; empty where something else is at fault.
    """

    def __init__(self, status: int, message: str, disabled_service: str):
        super().__init__(message)
        self.status = status
        self.disabled_service = disabled_service


class Finding(NamedTuple):
    """What came out for one thing.

    Attributes:
      state: ok; missing, which a run would fail by; unknown, as it may not be asked for; note, which a run can live with.
      text: what is there, or what is missing and how to get it.
    """

    state: Literal["ok", "missing", "unknown", "note"]
    text: str


class Cloud:
    """Google Cloud, as the application default credentials may see it.

    Attributes:
      account: email address that asks; empty where it cannot be known.
    """

    def __init__(self, project: str):
        """Finds the credentials and fetches a first token.

        Args:
          project: that a person's own credentials are counted to; empty for theirs.

        Raises:
          NoCredentialsError: if there are none, or no token is given for them.
          UnreachableError: if there is no connection.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a person's credentials without a quota project, which they get here
                credentials, _ = google.auth.default(scopes=_SCOPES)
            if project and isinstance(credentials, google.oauth2.credentials.Credentials) and not credentials.quota_project_id:
                credentials = credentials.with_quota_project(project)  # several APIs refuse a person's without one
            credentials.refresh(Request())
        except google.auth.exceptions.DefaultCredentialsError as error:
            reason = "none found" if "were not found" in str(error) else _one_line(str(error)).rstrip(".")
            raise NoCredentialsError(
                f"{reason}. Run `{LOGIN}`, or set GOOGLE_APPLICATION_CREDENTIALS to a service account's key file."
            ) from error
        except google.auth.exceptions.RefreshError as error:
            if error.retryable:
                raise UnreachableError(_one_line(str(error))) from error
            raise NoCredentialsError(f"no longer valid: {_one_line(str(error))}. Renew them: `{LOGIN}`.") from error
        except google.auth.exceptions.TransportError as error:
            raise UnreachableError(_one_line(str(error))) from error
        self._session = AuthorizedSession(credentials)
        retry = urllib3.Retry(
            total=_NUM_REPETITIONS,
            backoff_factor=0.5,
            status_forcelist=_REPEATED_STATUS,
            allowed_methods=("GET", "POST"),  # each POST here only asks
            raise_on_status=False,
        )
        self._session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retry))
        self.account = self._find_account(credentials)

    def get(self, host: str, path: str, **query: str | Sequence[str]) -> dict[str, Any]:
        """Asks for a resource.

        Args:
          host: such as `compute`, of googleapis.com.
          path: with a slash at the beginning, encoded.
          **query: its parameters.

        Raises:
          RefusedError: if the answer is an error.
          UnreachableError: if there is none.
        """
        return self._ask("GET", host, path, params=query).json()

    def find(self, host: str, path: str, **query: str | Sequence[str]) -> dict[str, Any] | None:
        """Asks for a resource that may not be there, which is None; see `get`."""
        try:
            return self.get(host, path, **query)
        except RefusedError as error:
            if error.status != 404:
                raise
            return None

    def read(self, host: str, path: str, **query: str) -> str:
        """Asks for a text; see `get`."""
        return self._ask("GET", host, path, params=query).content.decode()

    def post(self, host: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Asks by a POST request, which changes nothing; see `get`."""
        return self._ask("POST", host, path, json=body).json()

    def _ask(self, method: str, host: str, path: str, **options: Any) -> requests.Response:
        address = f"https://{host}.googleapis.com{path}"
        try:
            response = self._session.request(method, address, timeout=_TIMEOUT_SECONDS, **options)
        except google.auth.exceptions.RefreshError as error:
            raise NoCredentialsError(f"no longer valid: {_one_line(str(error))}. Renew them: `{LOGIN}`.") from error
        except (requests.RequestException, google.auth.exceptions.TransportError) as error:
            raise UnreachableError(_one_line(str(error))) from error
        if response.ok:
            return response
        raise _refusal(response)

    def _find_account(self, credentials: Any) -> str:
        # Not every kind of credentials has each of them.
        account = getattr(credentials, "service_account_email", "") or getattr(credentials, "account", "")
        if account:
            return account
        try:
            return self.get("openidconnect", "/v1/userinfo").get("email", "")
        except RefusedError:
            return ""


def quoted(part: str) -> str:
    """Encodes one part of a path."""
    return urllib.parse.quote(part, safe="")


def _refusal(response: requests.Response) -> RefusedError:
    try:
        error = response.json()["error"]
        message, details = error["message"], error.get("details", [])
    except (ValueError, KeyError, TypeError):
        message, details = response.text or response.reason, []
    disabled = [one.get("metadata", {}).get("service", "") for one in details if one.get("reason") == "SERVICE_DISABLED"]
    return RefusedError(response.status_code, _one_line(message)[:300], disabled[0] if disabled else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
