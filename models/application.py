"""The HTTP interface of a served model: TensorFlow Serving's REST API, Vertex AI's container contract, explanations, a page.

What a client did wrong is answered with 4xx and one JSON message. Called by `models.server`.
"""

import base64
import contextlib
import hashlib
import html
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from models import openapi
from models.payloads import RequestError
from models.server_config import ServerConfig
from models.service import ClientGoneError, Service
from models.telemetry import ObservedApplication
from models.versions import END, LOADING, Answer, ModelVersions, ServedModel, VersionState

_PAGE = Path(__file__).with_name("page.html")
_MAX_SHOWN_PATH = 200  # characters
_CLIENT_GONE = 499  # as nginx has it: nobody receives it, but logs and metrics do


class _VersionConvertor(Convertor[str]):
    """A version in a path: digits, and few enough that they are a number to everyone."""

    regex = "[0-9]{1,19}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("version", _VersionConvertor())


def create_app(config: ServerConfig, service: Service) -> Any:
    """Makes the ASGI application.

    Args:
      config: of the server.
      service: that answers.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.run():
            yield

    app = FastAPI(
        title="TFX Vision",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its pages load from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _handler_of_unknown_routes(config.name))
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(Exception, _answer_our_error)
    for error in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(error, _answer_nobody)
    base = f"/v1/models/{config.name}"
    versioned = f"{base}/versions/{{version:version}}"
    with_body = {"methods": ["POST"], "response_class": Response}

    async def predict(request: Request) -> Response:
        model = service.model(request.path_params.get("version"))
        async with service.read(request) as payload:
            rows = _rows(await service.predict(payload, model, request), model)
        if not payload.by_column:
            return _json({"predictions": rows})
        return _json({"outputs": {name: [row[name] for row in rows] for name in rows[0]}})

    async def predict_for_vertex(request: Request) -> Response:
        model = service.model(None)
        async with service.read(request) as payload:
            return _json({"predictions": _rows(await service.predict(payload, model, request), model)})

    async def explain(request: Request) -> Response:
        model = service.model(request.path_params.get("version"))
        async with service.read(request) as payload:
            answers = await service.predict(payload, model, request)
            explanations = await service.explain(payload, model, request)
        return _json({"explanations": explanations, "predictions": _rows(answers, model)})

    async def status(request: Request) -> Response:
        return _json({"model_version_status": _statuses(service.versions, request.path_params.get("version"))})

    async def metadata(request: Request) -> Response:
        model = service.model(request.path_params.get("version"))
        spec = {"name": config.name, "signature_name": "", "version": str(model.version)}
        return _json({"model_spec": spec, "metadata": {"signature_def": {"signature_def": model.signature_defs}}})

    async def health(request: Request) -> Response:
        model = service.model(None)
        return _json({"status": "ready", "version": str(model.version)})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    page, policy = _page(config)

    async def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    # First, as it may be TensorFlow Serving's route of the status, which answers before a model is ready.
    app.add_api_route(config.health_route, health, openapi_extra=openapi.health())
    for path, is_versioned in ((base, False), (versioned, True)):
        suffix = "_version" if is_versioned else ""
        app.add_api_route(
            f"{path}:predict", predict, name=f"predict{suffix}", openapi_extra=openapi.predict(is_versioned), **with_body
        )
        app.add_api_route(
            f"{path}:explain", explain, name=f"explain{suffix}", openapi_extra=openapi.explain(is_versioned), **with_body
        )
        app.add_api_route(path, status, name=f"status{suffix}", openapi_extra=openapi.status(is_versioned))
        app.add_api_route(f"{path}/metadata", metadata, name=f"metadata{suffix}", openapi_extra=openapi.metadata(is_versioned))
    app.add_api_route(config.predict_route, predict_for_vertex, openapi_extra=openapi.predict(False), **with_body)
    app.add_api_route("/metrics", metrics, include_in_schema=False)
    app.add_api_route("/", show_page, include_in_schema=False)
    return ObservedApplication(app, service.metrics)


def _rows(answers: list[Answer], model: ServedModel) -> list[dict[str, Any]]:
    return [
        {
            "label": answer.label,
            "probability": answer.probability,
            "labels": model.labels,
            "probabilities": answer.probabilities,
        }
        for answer in answers
    ]


def _statuses(versions: ModelVersions, version: str | None) -> list[dict[str, Any]]:
    """Gives the states of versions as TensorFlow Serving does, the newest first."""
    states = dict(versions.states)
    if version is not None:
        if int(version) not in states:
            raise RequestError(404, f"Expected a known version. Received: {version}. Known are {sorted(states) or 'none'}.")
        states = {int(version): states[int(version)]}
    if not states:
        states = {0: VersionState(LOADING)}
    return [
        {
            "version": str(number),
            "state": state.state,
            "status": {
                "error_code": "UNKNOWN" if state.state == END and state.error else "OK",
                "error_message": state.error,
            },
        }
        for number, state in sorted(states.items(), reverse=True)
    ]


def _json(value: Any, *, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(body, status_code=code, media_type="application/json", headers=headers)


async def _answer_our_error(request: Request, error: Exception) -> Response:
    return _json({"error": "The server failed. Its log says why, under this answer's X-Request-ID."}, code=500)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _answer_request_error(request: Request, error: RequestError) -> Response:
    request.state.error = error.message
    return _json({"error": error.message}, code=error.status, headers=error.headers)


def _handler_of_unknown_routes(name: str) -> Callable[[Request, HTTPException], Awaitable[Response]]:
    async def answer(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:_MAX_SHOWN_PATH]
        if error.status_code == 404:
            message = f"Expected a path such as /v1/models/{name}:predict. Received: {path!r}. GET /openapi.json lists all."
        elif error.status_code == 405:
            message = (
                f"Expected {(error.headers or {}).get('Allow', 'another method')} for {path!r}. Received: {request.method}."
            )
        else:
            message = str(error.detail)
        return _json({"error": message}, code=error.status_code, headers=dict(error.headers or {}))

    return answer


def _page(config: ServerConfig) -> tuple[bytes, str]:
    """Fills the page's settings in; returns it and the policy that allows its own script and style, and nothing else."""
    settings = {"model": config.name, "maxBodyBytes": config.max_body_bytes, "maxPixels": config.max_pixels}
    text = _PAGE.read_text(encoding="utf-8").replace("{{settings}}", html.escape(json.dumps(settings)))
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy
