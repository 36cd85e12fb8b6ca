"""Cloud Storage's JSON API on local folders, for `vertex_stand_in`: a bucket is a folder, an object a file.

Enough for google-cloud-storage, Beam's file system and TensorFlow's: buckets, permissions, objects (get, list, delete, copy and
rewrite, compose), uploads (simple, multipart, resumable), downloads with ranges. Generations and preconditions are left out.
"""

import base64
import dataclasses
import datetime
import email
import hashlib
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
from google_cloud_network import HttpsAnswer, HttpsRequest

HOSTS = r"(storage\.googleapis\.com/|www\.googleapis\.com/(upload/|download/|resumable/)*storage/)"
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
_BOUNDARY = re.compile(r"""boundary=["']?([^"';]+)""")
_RANGE = re.compile(r"bytes=(?P<begin>\d+)-(?P<end>\d*)")
_CONTENT_RANGE = re.compile(r"bytes (?:\*|(?P<begin>\d+)-\d+)/(?P<size>\d+|\*)")


class StorageStandIn:
    """The buckets of one stand-in.

    Attributes:
      permissions: what the caller has on each bucket, as far as the bucket itself, its policy and `test_iam_permissions` go;
        everything where a bucket has no entry.
      locations: of each bucket that there is.
      fault: an answer that every request gets in place of its own, as `HttpsAnswer.error(403, "no access")`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._uploads: dict[str, tuple[str, str, bytearray]] = {}
        self._markers: set[tuple[str, str]] = set()  # empty objects whose name ends in "/", TensorFlow's folders
        self._ids = itertools.count(1)
        self.permissions: dict[str, set[str]] = {}
        self.locations: dict[str, str] = {}
        self.fault: HttpsAnswer | None = None

    def create_bucket(self, name: str, *, location: str = "US-CENTRAL1") -> Path:
        """Makes the bucket and gives its folder, which a test may also write into."""
        self.locations[name] = location
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def path(self, uri: str) -> Path:
        """The file or folder of a gs:// URI."""
        return self._folder / uri.removeprefix("gs://")

    def exists(self, uri: str) -> bool:
        """Whether there are objects under the URI; of a bucket that the test did not create, that is taken for granted."""
        if uri.removeprefix("gs://").split("/")[0] not in self.locations:
            return True
        path = self.path(uri)
        return path.is_file() or any(one.is_file() for one in path.rglob("*"))

    def answer(self, request: HttpsRequest) -> HttpsAnswer:
        """Answers one request of the JSON API, or of the XML API for an object's bytes."""
        if self.fault:
            return self.fault
        if "authorization" not in request.headers:
            return HttpsAnswer.error(401, "Anonymous caller does not have access.")
        parts = [urllib.parse.unquote(part) for part in request.path.strip("/").split("/")]
        if parts[:3] == ["upload", "storage", "v1"] or parts[:4] == ["resumable", "upload", "storage", "v1"]:
            return self._upload(request, parts[parts.index("b") + 1])
        if parts == ["batch", "storage", "v1"]:
            return self._batch(request)
        if match := _OBJECT.match(request.path):
            rest = parts[parts.index("o") + 2 :]
            return self._object(request, match["bucket"], urllib.parse.unquote(match["name"]), rest)
        if parts[:3] == ["storage", "v1", "b"]:
            return self._bucket(request, parts[3:])
        return self._object(request, parts[0], "/".join(parts[1:]), ["xml"])

    def _batch(self, request: HttpsRequest) -> HttpsAnswer:
        """Answers the requests inside one, as Beam sends them to delete and to rename."""
        content_type = f"Content-Type: {request.headers['content-type']}\n\n".encode()
        answers = []
        for part in email.message_from_bytes(content_type + request.body).get_payload():
            first, _, rest = part.get_payload().partition("\n")
            inner = email.message_from_string(rest.lstrip("\r"))
            method, address, _ = first.split()
            url = urllib.parse.urlsplit(address)
            body = inner.get_payload().encode()
            answer = self.answer(dataclasses.replace(request, method=method, path=url.path, query=url.query, body=body))
            content = "" if answer.status == 204 else json.dumps(answer.body)
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {answer.status} Answer\r\n"
                f"Content-Type: application/json\r\n\r\n{content}\r\n"
            )
        headers = {"Content-Type": "multipart/mixed; boundary=batch"}
        return HttpsAnswer(200, ("".join(answers) + "--batch--").encode(), headers)

    def _bucket(self, request: HttpsRequest, parts: list[str]) -> HttpsAnswer:
        if not parts:
            if request.method == "POST":
                content = json.loads(request.body)
                self.create_bucket(content["name"], location=content.get("location", "US"))
                return HttpsAnswer(body=self._bucket_metadata(content["name"]))
            return HttpsAnswer(body={"items": [self._bucket_metadata(name) for name in sorted(self.locations)]})
        name = parts[0]
        if name not in self.locations:
            return HttpsAnswer.error(404, f"The specified bucket does not exist: {name}")
        if parts[1:] == ["iam", "testPermissions"]:
            asked = set(urllib.parse.parse_qs(request.query).get("permissions", []))
            return HttpsAnswer(body={"permissions": sorted(asked & self.permissions.get(name, asked))})
        if parts[1:] == ["o"]:
            return self._list(request, name)
        permission = "storage.buckets.getIamPolicy" if parts[1:] == ["iam"] else "storage.buckets.get"
        if permission not in self.permissions.get(name, {permission}):
            return HttpsAnswer.error(403, f"Permission '{permission}' denied on resource (or it may not exist).")
        if parts[1:] == ["iam"]:
            return HttpsAnswer(body={"version": 1, "bindings": [], "etag": "CAE="})
        return HttpsAnswer(body=self._bucket_metadata(name))

    def _bucket_metadata(self, name: str) -> dict[str, Any]:
        location = self.locations[name].upper()
        kind = "region" if "-" in location else "multi-region"
        return {"kind": "storage#bucket", "id": name, "name": name, "location": location, "locationType": kind}

    def _list(self, request: HttpsRequest, bucket: str) -> HttpsAnswer:
        prefix, delimiter = request.parameters.get("prefix", ""), request.parameters.get("delimiter", "")
        items, prefixes = [], set()
        for name in self._names(bucket):
            if not name.startswith(prefix):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(self._metadata(bucket, name))
        begin = int(request.parameters.get("pageToken", 0))
        end = begin + int(request.parameters.get("maxResults", 1000))
        body = {"kind": "storage#objects", "items": items[begin:end], "prefixes": sorted(prefixes)}
        return HttpsAnswer(body=body | ({"nextPageToken": str(end)} if end < len(items) else {}))

    def _names(self, bucket: str) -> Iterator[str]:
        folder = self._folder / bucket
        files = {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}
        yield from sorted(files | {name for owner, name in self._markers if owner == bucket})

    def _object(self, request: HttpsRequest, bucket: str, name: str, rest: list[str]) -> HttpsAnswer:
        if bucket not in self.locations:
            return HttpsAnswer.error(404, f"The specified bucket does not exist: {bucket}")
        path = self._folder / bucket / name
        if rest[:1] == ["compose"]:
            sources = json.loads(request.body)["sourceObjects"]
            content = b"".join((self._folder / bucket / one["name"]).read_bytes() for one in sources)
            return self._write(bucket, name, content)
        if (bucket, name) in self._markers:
            if request.method == "DELETE":
                self._markers.remove((bucket, name))
            return HttpsAnswer(204) if request.method == "DELETE" else HttpsAnswer(body=self._metadata(bucket, name))
        if not path.is_file():
            return HttpsAnswer.error(404, f"No such object: {bucket}/{name}")
        if rest[:1] in (["rewriteTo"], ["copyTo"]):
            target = rest[rest.index("b") + 1], rest[rest.index("o") + 1]
            answer = self._write(*target, path.read_bytes())
            size = str(path.stat().st_size)
            rewritten = {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": answer.body}
            return answer if rest[0] == "copyTo" else HttpsAnswer(body=rewritten)
        if request.method == "DELETE":
            path.unlink()
            return HttpsAnswer(204)
        if request.method == "GET" and (rest == ["xml"] or request.parameters.get("alt") == "media"):
            return _download(request, path)
        return HttpsAnswer(body=self._metadata(bucket, name))

    def _metadata(self, bucket: str, name: str) -> dict[str, Any]:
        path = self._folder / bucket / name
        content, status = (b"", path.parent.stat()) if name.endswith("/") else (path.read_bytes(), path.stat())
        changed = datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        generation = str(status.st_mtime_ns // 1000)
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "size": str(len(content)),
            "generation": generation,
            "metageneration": "1",
            "timeCreated": changed,
            "updated": changed,
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
            "etag": generation,
        }

    def _write(self, bucket: str, name: str, content: bytes) -> HttpsAnswer:
        if bucket not in self.locations:
            return HttpsAnswer.error(404, f"The specified bucket does not exist: {bucket}")
        path = self._folder / bucket / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            self._markers.add((bucket, name))
        else:
            path.write_bytes(content)
        return HttpsAnswer(body=self._metadata(bucket, name))

    def _upload(self, request: HttpsRequest, bucket: str) -> HttpsAnswer:
        kind = request.parameters.get("uploadType")
        if kind == "media":
            return self._write(bucket, request.parameters["name"], request.body)
        if kind == "multipart":
            boundary = _BOUNDARY.search(request.headers["content-type"])[1].encode()
            metadata, content = [part.partition(b"\r\n\r\n")[2] for part in request.body.split(b"--" + boundary)[1:3]]
            return self._write(bucket, json.loads(metadata)["name"], content.removesuffix(b"\r\n"))
        upload = request.parameters.get("upload_id")
        if not upload:
            name = request.parameters.get("name") or json.loads(request.body)["name"]
            upload = str(next(self._ids))
            self._uploads[upload] = (bucket, name, bytearray())
            location = f"https://{request.host}{request.path}?uploadType=resumable&upload_id={upload}"
            return HttpsAnswer(headers={"Location": location, "X-GUploader-UploadID": upload})
        bucket, name, content = self._uploads[upload]
        match = _CONTENT_RANGE.fullmatch(request.headers.get("content-range", f"bytes */{len(request.body)}"))
        if match["begin"]:
            del content[int(match["begin"]) :]
        content.extend(request.body)
        if match["size"] == "*" or len(content) < int(match["size"]):
            return HttpsAnswer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {})
        del self._uploads[upload]
        return self._write(bucket, name, bytes(content))


def _download(request: HttpsRequest, path: Path) -> HttpsAnswer:
    content = path.read_bytes()
    checksum = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
    headers = {"X-Goog-Hash": f"crc32c={checksum}", "X-Goog-Stored-Content-Encoding": "identity"}
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if not match:
        return HttpsAnswer(200, content, headers)
    begin, end = int(match["begin"]), min(int(match["end"] or len(content)), len(content) - 1)
    if begin >= len(content):
        return HttpsAnswer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
    return HttpsAnswer(206, content[begin : end + 1], headers)
