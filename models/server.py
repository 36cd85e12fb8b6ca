"""Serves a trained model over HTTP: on a laptop, and as the process in a Vertex AI endpoint's container.

    python -m models.server --model runs/solar/serving_model
    curl -d '{"instances": [{"image_bytes": {"b64": "'$(base64 -w0 photo.jpg)'"}}]}' localhost:8501/v1/models/model:predict

A model is ready some ten seconds after the start on two cores. The page at http://localhost:8501/ classifies and explains
images that are dropped on it; /openapi.json describes the interface. Exit codes: 0 after SIGTERM or Ctrl-C, when all requests
are answered; 1 failed; 2 the model or a setting is wrong.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

# Before TensorFlow is loaded: off by default on CPUs without AVX-512, where it makes the backbone 2.5 times as fast.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its lines are no JSON; what matters of them comes as exceptions, too
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

from data.errors import EXIT_DONE, EXIT_FAILED, InputError, report_error, validate
from models.server_config import ServerConfig

_METAVARS = {"model": "DIR", "facts": "FILE"}
# Vertex AI's container contract; https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
_ENVIRONMENT = {
    "AIP_STORAGE_URI": "model",
    "AIP_HTTP_PORT": "port",
    "AIP_HEALTH_ROUTE": "health_route",
    "AIP_PREDICT_ROUTE": "predict_route",
}
_ANY_HOST = ("0.0.0.0", "::", "127.0.0.1", "::1")  # which this machine reaches as localhost
_BACKLOG = 512  # connections that the system keeps until they are accepted

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = vars(_parse_arguments(argv))
    debug = arguments.pop("debug")
    try:
        config = read_config(arguments, os.environ)
        with _listen(config) as listener:
            return _serve(config, listener)
    except Exception as error:
        return report_error(error, debug=debug)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.server",
        description="Serves a trained model over HTTP. A name in capitals is the environment variable that a flag wins over.",
        epilog="Exit codes: 0 after SIGTERM or Ctrl-C; 1 failed; 2 the model or a setting is wrong.",
    )
    for name, field in ServerConfig.model_fields.items():
        default = "" if field.is_required() or field.default == "" else f"; default {field.default}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=_METAVARS.get(name, field.annotation.__name__.upper()),
            help=(field.description + default).replace("%", "%%"),
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def read_config(flags: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    """Reads the settings; flags win over the environment.

    Args:
      flags: by the names of `ServerConfig`.
      environment: of the process.

    Raises:
      InputError: one line that names the first wrong setting.
    """
    values = {setting: environment[name] for name, setting in _ENVIRONMENT.items() if environment.get(name)}
    if environment.get("AIP_HTTP_PORT"):  # in a container, whose own network decides who can connect
        values["host"] = "0.0.0.0"
    values |= flags
    if not values.get("model"):
        raise InputError("Expected --model DIR. Received: none. Give the serving_model folder of a run, or one SavedModel.")
    return validate(ServerConfig, values)


def _listen(config: ServerConfig) -> socket.socket:
    """Binds the socket before the seconds that TensorFlow takes to load, so that a port in use shows at once."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        raise InputError(
            f"Expected --host and --port that are free. Received: {config.host}:{config.port}: {error.strerror or error}. "
            "Give another --port; 0 takes a free one."
        ) from error
    return listener


def _serve(config: ServerConfig, listener: socket.socket) -> int:
    from models.telemetry import log_as_json, log_event

    log_as_json()
    warnings.simplefilter("ignore", FutureWarning)  # of Google's libraries, of the next versions of Python
    # Here, as they load TensorFlow.
    import uvicorn

    from models.application import create_app
    from models.connections import cut_overdue_connections, limited_protocol
    from models.service import Service

    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(config, on_failure=stop)
    settings = uvicorn.Config(
        create_app(config, service),
        http=limited_protocol(config),
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=config.keep_alive_seconds,
        timeout_graceful_shutdown=config.drain_seconds,
    )
    server = uvicorn.Server(settings)

    async def run() -> None:
        watchdog = asyncio.create_task(cut_overdue_connections(server.server_state.connections))
        host, port = listener.getsockname()[:2]
        page = f"http://{'localhost' if host in _ANY_HOST else f'[{host}]' if ':' in host else host}:{port}/"
        log_event(_logger, "listening", host=host, port=port, page=page, model=config.model)
        try:
            await server.serve(sockets=[listener])
        finally:
            watchdog.cancel()
        log_event(_logger, "stopped")

    # uvicorn raises the signal again when it has ended, for whoever started it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
        runner.run(run())
    if failures:
        raise failures[0]
    return EXIT_DONE


if __name__ == "__main__":
    code = EXIT_FAILED
    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # TensorFlow's own way out takes a second, and a version that is loading would be waited for
