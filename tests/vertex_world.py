"""What the services of `vertex_stand_in` share: names, numbers, checks of labels, and lists with filter, order and pages."""

import dataclasses
import datetime
import itertools
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from google.api_core import exceptions
from google.protobuf import empty_pb2, field_mask_pb2

_LOCATION = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)(?P<rest>/.*)?")
_LABEL = re.compile(r"[\w-]{0,63}")
_MAX_LABELS = 64
_TERM = re.compile(r"""\s*(?P<field>[\w.]+)\s*(?P<operator>!=|>=|<=|=|>|<|:)\s*(?P<quote>["']?)(?P<value>.*?)(?P=quote)\s*""")
_SNAKE = re.compile(r"(?<=[a-z])([A-Z])")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
    ">=": lambda left, right: left >= right,
    "<=": lambda left, right: left <= right,
}
Message = Any  # a proto-plus message, or one of protobuf's own


@dataclasses.dataclass(frozen=True)
class LongRunning:
    """What a service has accepted and not yet done.

    Attributes:
      resource: name that the operation belongs to.
      finish: does it and gives the operation's response; it may raise, which ends the operation with the error.
      half_way: does what a failure half-way leaves behind.
      is_exclusive: no other operation on the resource may start before its end.
    """

    resource: str
    finish: Callable[[], Message] = empty_pb2.Empty
    half_way: Callable[[], Any] = lambda: None
    is_exclusive: bool = False


class World:
    """The one project, its regions, its lock and the counter behind all ids."""

    def __init__(self, project: str, number: str):
        self.project, self.number = project, number
        self.lock = threading.RLock()
        self.busy: dict[str, str] = {}  # the resource -> the operation
        self._ids = itertools.count(1001)

    def new_id(self) -> str:
        """Digits, as the service's own ids are."""
        return str(next(self._ids) * 1_000_003)

    def canonical(self, name: str) -> str:
        """The name as the service gives it back, with the project's number.

        Raises:
          InvalidArgument: if the name is none of a location.
          PermissionDenied: if it is another project's.
        """
        match = _LOCATION.fullmatch(name)
        if not match:
            raise exceptions.InvalidArgument(f"Invalid resource name: {name!r}")
        if match["project"] not in (self.project, self.number):
            raise exceptions.PermissionDenied(f"Permission denied on resource '{name}' (or it may not exist).")
        return f"projects/{self.number}/locations/{match['region']}{match['rest'] or ''}"

    def require_idle(self, resource: str) -> None:
        """Refuses a second operation on the resource."""
        if resource in self.busy:
            raise exceptions.FailedPrecondition(
                f"There are other operations running on the resource {resource}. Operation(s) are: {self.busy[resource]}."
            )


def now() -> datetime.datetime:
    """The time of a message's fields."""
    return datetime.datetime.now(datetime.UTC)


def require_new(message: Message, *, kind: str) -> None:
    """Checks the display name and the labels of what is to be created."""
    if not message.display_name or len(message.display_name) > 128:
        raise exceptions.InvalidArgument(f"{kind}.display_name must have 1 to 128 characters.")
    check_labels(message.labels)


def check_labels(labels: Iterable[str]) -> None:
    """Refuses what the service refuses: capitals, dots, more than 63 characters, more than 64 labels."""
    labels = dict(labels)
    if len(labels) > _MAX_LABELS:
        raise exceptions.InvalidArgument(f"{len(labels)} labels, at most {_MAX_LABELS} are allowed.")
    for key, value in labels.items():
        good_key = key and key[0].islower() and _LABEL.fullmatch(key)
        if not good_key or not _LABEL.fullmatch(value) or key.lower() != key or value.lower() != value:
            raise exceptions.InvalidArgument(
                f"Invalid label {key}={value}: keys begin with a lower case letter; keys and values have at most 63 lower case "
                "letters, digits, underscores and dashes."
            )


def find(resources: dict[str, Message], name: str, *, kind: str) -> Message:
    """The resource, or NOT_FOUND."""
    if name not in resources:
        raise exceptions.NotFound(f"The {kind} does not exist: {name}")
    return resources[name]


def merge(target: Message, changes: Message, mask: field_mask_pb2.FieldMask, *, allowed: Iterable[str]) -> None:
    """Writes the fields of an update mask, whole, as the services' update methods do."""
    paths = [_SNAKE.sub(lambda match: "_" + match[1].lower(), path) for path in mask.paths]
    if not paths:
        raise exceptions.InvalidArgument("update_mask must name a field.")
    for path in paths:
        if path not in allowed:
            raise exceptions.InvalidArgument(f"The field {path} cannot be updated.")
        setattr(target, path, getattr(changes, path))


def list_page(request: Message, resources: Iterable[Message], *, parent: str = "") -> tuple[list[Message], str]:
    """The page of the resources that the request's filter, order and page token ask for, newest first by default.

    Returns:
      The page and the token of the next one, empty after the last.
    """
    chosen = [one for one in resources if one.name.startswith(parent) and _matches(one, request.filter)]
    chosen.sort(key=lambda one: one.create_time.timestamp() if one.create_time else 0.0, reverse=True)
    for order in reversed([order.split() for order in getattr(request, "order_by", "").split(",") if order.strip()]):
        chosen.sort(key=lambda one, field=order[0]: _value(one, field), reverse=order[1:] == ["desc"])
    begin = int(request.page_token or 0)
    end = begin + (request.page_size or 100)
    return chosen[begin:end], str(end) if end < len(chosen) else ""


def _matches(resource: Message, text: str) -> bool:
    """Whether a filter of terms joined by AND holds; the services know more, which is refused here and not guessed."""
    for term in re.split(r"\s+AND\s+", text) if text else []:
        match = _TERM.fullmatch(term)
        if not match or any(word in term for word in (" OR ", "NOT ", "(")):
            raise exceptions.InvalidArgument(f"Invalid filter: {text!r} (or one that the stand-in does not know)")
        if match["operator"] == ":":
            found, field = resource, match["field"]
            value = match["value"]
            matched = value in dict(found.labels) if field == "labels" else _value(found, field) == value or value == "*"
        else:
            left, right = _value(resource, match["field"]), match["value"]
            matched = _OPERATORS[match["operator"]](str(left), right)
        if not matched:
            return False
    return True


def _value(resource: Message, field: str) -> Any:
    field = _SNAKE.sub(lambda match: "_" + match[1].lower(), field)
    if field.startswith("labels."):
        return dict(resource.labels).get(field.removeprefix("labels."), "")
    if field == "pipeline_name":
        field = "display_name"
    if field in ("model", "model_id", "endpoint", "endpoint_id"):
        return resource.name.rsplit("/", 1)[-1].partition("@")[0]
    try:
        value = getattr(resource, field)
    except AttributeError as error:
        raise exceptions.InvalidArgument(f"Invalid field: {field}") from error
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return getattr(value, "name", value)
