"""The network of Google Cloud's stand-in: what lets the real client libraries reach servers on localhost without knowing it.

`Network` gives environment variables, and these alone lead every client there, in this process and in a child process. A proxy
takes `CONNECT name.googleapis.com:443` and hands the bytes to the gRPC server or to the HTTPS server, as the TLS handshake asks
(ALPN `h2` or not). Both show a certificate for `*.googleapis.com` of an authority made here, which the variables make the
clients trust, and a service account's key file names who asks. Any other host is refused, so that no test leaves the machine.

The authority is one for the process, and gRPC is told of it when this module is imported, before the first test runs: gRPC
reads its root certificates once in a process, with the first channel. Called by `vertex_stand_in`; a test needs it only to add
an answer over HTTPS: `stand_in.network.https.append((pattern, answer))`.
"""

import collections
import dataclasses
import datetime
import functools
import json
import logging
import os
import re
import selectors
import socket
import socketserver
import ssl
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

# `rep` hosts serve the SDK's multi-region locations; a certificate's star stands for one label only.
_HOST_NAMES = ("*.googleapis.com", "*.rep.googleapis.com", "localhost")
_HANDSHAKE_RECORD = 22  # the first byte of a TLS connection
_ALPN_H2 = b"\x02h2"
_SERVICE_ACCOUNT = "tfx-vision"
_TOKEN = r"oauth2\.googleapis\.com/token|www\.googleapis\.com/oauth2/v\d/token"  # the second is TensorFlow's


@dataclasses.dataclass(frozen=True)
class HttpsRequest:
    """One request over HTTPS, as an answer gets it; `query` is as sent, header names are in lower case."""

    method: str
    host: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def parameters(self) -> dict[str, str]:
        """The last value of each name in the query."""
        return dict(urllib.parse.parse_qsl(self.query, keep_blank_values=True))


@dataclasses.dataclass(frozen=True)
class HttpsAnswer:
    """Status, body (JSON unless bytes) and further headers."""

    status: int = 200
    body: Any = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def error(cls, status: int, message: str) -> "HttpsAnswer":
        """Google's JSON form of an error."""
        return cls(status, {"error": {"code": status, "message": message, "errors": [{"message": message}]}})


Answer = Callable[[HttpsRequest], HttpsAnswer]


class _Authority:
    """A certificate authority, and a key and a certificate by it for the servers. Files last as long as the process."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="google-cloud-stand-in-")
        authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Stand-in of Google Cloud")])
        server_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _HOST_NAMES[0])])
        certificate = self._build(name, authority_key).subject_name(name)
        certificate = certificate.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        server = self._build(name, key).subject_name(server_name)
        names = x509.SubjectAlternativeName([x509.DNSName(host) for host in _HOST_NAMES])
        server = server.add_extension(names, critical=False)
        self.certificate_pem = certificate.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.server_pem = server.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.server_key_pem = _private_pem(key)
        self.path = Path(self._folder.name) / "authority.pem"
        self.path.write_bytes(self.certificate_pem)
        self.server_path = self.path.with_name("server.pem")
        self.server_path.write_bytes(self.server_key_pem + self.server_pem)
        self.service_account_key_pem = _private_pem(rsa.generate_private_key(65537, 2048)).decode()

    @staticmethod
    def _build(issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        return builder.not_valid_after(now + datetime.timedelta(days=7))


def _private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    private_format = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, private_format, serialization.NoEncryption())


@functools.cache
def authority() -> _Authority:
    """The one authority of this process."""
    return _Authority()


os.environ["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"] = str(authority().path)


class Network:
    """The proxy, the HTTPS server and the credentials.

    Attributes:
      environment: the variables, for `monkeypatch.setenv` or a child process.
      https: pairs of a pattern of `host/path` and its answer; the last one that matches is asked.
      hosts: every host that a client asked for, with how often.
      refused: what no answer was found for: hosts outside Google Cloud and unknown HTTPS requests.
      is_down: makes the proxy refuse all new connections.
    """

    def __init__(self, folder: Path, *, project: str, grpc_port: int):
        """Writes the key file into `folder`; `start` opens the servers.

        Args:
          folder: an existing folder of the test's own.
          project: id of the project that the credentials belong to.
          grpc_port: of the server on localhost that speaks gRPC over TLS with the authority's certificate.
        """
        self.https: list[tuple[str, Answer]] = [
            (_TOKEN, _give_token),
            # google.auth asks this in the background for every service account; 0x0 is "everywhere".
            (
                r"iamcredentials\.googleapis\.com/.*/allowedLocations",
                lambda request: HttpsAnswer(body={"encodedLocations": "0x0"}),
            ),
        ]
        self.hosts: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self.is_down = False
        self.grpc_port = grpc_port
        self._https_server = _HttpsServer(self)
        self.https_port = self._https_server.server_address[1]
        self._proxy = _Proxy(self)
        key_file = folder / "service_account.json"
        key_file.write_text(json.dumps(_key_file(project)), encoding="utf-8")
        proxy, certificate = f"http://127.0.0.1:{self._proxy.server_address[1]}", str(authority().path)
        self.environment = {
            **dict.fromkeys(("grpc_proxy", "https_proxy", "HTTPS_PROXY"), proxy),
            **dict.fromkeys(("no_grpc_proxy", "no_proxy", "NO_PROXY"), "localhost,127.0.0.1,::1"),
            **dict.fromkeys(
                ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), certificate
            ),
            "GOOGLE_APPLICATION_CREDENTIALS": str(key_file),
            "GOOGLE_CLOUD_PROJECT": project,
            "CLOUDSDK_CONFIG": str(folder / "gcloud"),
            "NO_GCE_CHECK": "true",
        }

    def start(self) -> None:
        """Serves until `stop`."""
        for server in (self._https_server, self._proxy):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Closes both servers; open connections end with their clients."""
        for server in (self._proxy, self._https_server):
            server.shutdown()
            server.server_close()

    def answer(self, request: HttpsRequest) -> HttpsAnswer:
        """Asks the last answer that matches, or says in the log that there is none."""
        for pattern, answer in reversed(self.https):
            if re.match(pattern, request.host + request.path):
                return answer(request)
        unknown = f"{request.method} https://{request.host}{request.path}"
        self.refused.append(unknown)
        logging.getLogger(__name__).error("The stand-in of Google Cloud has no answer to %s", unknown)
        return HttpsAnswer.error(501, f"the stand-in has no answer to {unknown}")


def _give_token(request: HttpsRequest) -> HttpsAnswer:
    if b"assertion=" not in request.body:
        return HttpsAnswer(400, {"error": "invalid_grant", "error_description": "no assertion"})
    return HttpsAnswer(body={"access_token": "ya29.stand-in", "expires_in": 3600, "token_type": "Bearer"})


def _key_file(project: str) -> dict[str, str]:
    email = f"{_SERVICE_ACCOUNT}@{project}.iam.gserviceaccount.com"
    return {
        "type": "service_account",
        "project_id": project,
        "private_key_id": "1",
        "private_key": authority().service_account_key_pem,
        "client_email": email,
        "client_id": "1",
        "auth_uri": "https://accounts.google.com/o/oauth2/auth",
        "token_uri": "https://oauth2.googleapis.com/token",
    }


class _HttpsServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with five, a busy machine drops connections of Beam's and TensorFlow's many threads

    def __init__(self, network: Network):
        super().__init__(("127.0.0.1", 0), _HttpsHandler)
        self.network = network
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(authority().server_path)

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        # Here, in the connection's own thread: a handshake in `get_request` would hold up the other clients.
        with self.context.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def handle_error(self, *unused: Any) -> None:
        """Says nothing of a client that has gone."""


class _HttpsHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        body = self._read_chunks() if self.headers.get("Transfer-Encoding", "").lower() == "chunked" else self._read_body()
        address = urllib.parse.urlsplit(self.path)
        request = HttpsRequest(
            method=self.command,
            host=self.headers.get("Host", "").removesuffix(":443"),
            path=address.path,
            query=address.query,
            headers={name.lower(): value for name, value in self.headers.items()},
            body=body,
        )
        try:
            answer = self.server.network.answer(request)
        except Exception as error:  # the client gets what a failing service would send, the test's log the reason
            logging.getLogger(__name__).exception("The stand-in of Google Cloud failed")
            answer = HttpsAnswer.error(500, str(error))
        is_bytes = isinstance(answer.body, bytes)
        content = answer.body if is_bytes else json.dumps(answer.body).encode()
        content = b"" if answer.status == 204 else content
        self.send_response(answer.status)
        content_type = "application/octet-stream" if is_bytes else "application/json"
        for name, value in {"Content-Type": content_type, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *unused: Any) -> None:
        """Keeps the test's output short."""


class _Proxy(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, network: Network):
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.network = network

    def handle_error(self, *unused: Any) -> None:
        """Says nothing of a client that has gone."""


class _ProxyHandler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        network, words = self.server.network, self.rfile.readline().decode("latin-1").split()
        while self.rfile.readline().strip():
            pass
        if len(words) < 2:
            return
        host = words[1].removesuffix(":443")
        network.hosts[host] += 1
        if network.is_down or words[0] != "CONNECT" or not host.endswith(".googleapis.com"):
            if not network.is_down:
                network.refused.append(" ".join(words[:2]))
            self.wfile.write(b"HTTP/1.1 503 Refused\r\nContent-Length: 0\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        hello = self._read_hello()
        port = network.grpc_port if _ALPN_H2 in hello else network.https_port
        with socket.create_connection(("127.0.0.1", port)) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.sendall(hello)
            _exchange(self.connection, server)

    def _read_hello(self) -> bytes:
        """The client's first TLS record, whole, as its extensions may come in a second packet."""
        head = self.rfile.read(5)
        if len(head) < 5 or head[0] != _HANDSHAKE_RECORD:
            return head
        # What the reader has buffered beyond the record would be lost; a client sends no more before the server's answer.
        return head + self.rfile.read(int.from_bytes(head[3:], "big"))


def _exchange(client: socket.socket, server: socket.socket) -> None:
    """Carries bytes both ways until one side has closed."""
    other = {client: server, server: client}
    with selectors.DefaultSelector() as selector:  # `select` knows no descriptor beyond 1,023
        for source in other:
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                content = key.fileobj.recv(1 << 16)
                if not content:
                    return
                other[key.fileobj].sendall(content)
