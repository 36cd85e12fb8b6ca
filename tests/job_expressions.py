"""The small languages in a compiled pipeline job: typed values, placeholders, conditions, and queries of artifacts.

Called by `tests/job_executor.py`. Only what TFX's compiler writes is understood; anything else is refused, never guessed.
"""

import ast
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message
from kfp.pipeline_spec import pipeline_spec_pb2 as pb

LEGACY_FIELDS = {int: "int_value", float: "double_value", str: "string_value"}  # of a Value under schema 2.0.0
_TYPES = {
    **{"INT": int, "DOUBLE": float, "STRING": str},
    **{"NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool, "LIST": list, "STRUCT": dict},
}


@dataclasses.dataclass
class Artifact:
    """An artifact in the metadata store.

    Attributes:
      name: resource name, projects/P/locations/R/metadataStores/default/artifacts/N.
      schema: its type, an ArtifactTypeSchema as JSON.
      uri: where it lies.
      metadata: as JSON; every number is a float, as the service has it.
      contexts: resource names of its pipeline and of its run.
      state: LIVE, or PENDING until its task has succeeded.
    """

    name: str
    schema: dict[str, Any]
    uri: str
    metadata: dict[str, Any]
    contexts: tuple[str, ...] = ()
    state: str = "PENDING"

    @property
    def schema_title(self) -> str:
        """The type's title, such as tfx.Model."""
        return self.schema.get("schemaTitle") or yaml.safe_load(self.schema["instanceSchema"])["title"]

    def message(self) -> pb.RuntimeArtifact:
        """Returns it as a container is told of it."""
        fields = {"name": self.name, "type": self.schema, "uri": self.uri, "metadata": self.metadata}
        return json_format.ParseDict(fields, pb.RuntimeArtifact())


def python_type(declared: Any) -> type:
    """Returns the type of a ParameterSpec of either schema."""
    if declared.parameter_type:
        return _TYPES[pb.ParameterType.ParameterTypeEnum.Name(declared.parameter_type)]
    return _TYPES[pb.PrimitiveType.PrimitiveTypeEnum.Name(declared.type)]


def typed(value: Any, declared: Any, name: str) -> Any:
    """Returns a value as its declared type.

    Raises:
      ValueError: if it is of another type.
    """
    wanted = python_type(declared)
    if declared.parameter_type and type(value) in (int, float) and wanted in (int, float) and wanted(value) == value:
        return wanted(value)  # under schema 2.1.0 JSON's one kind of number
    require(type(value) is wanted, f"`{name}` to be {wanted.__name__}", repr(value))
    return value


def plain(message: Message) -> Any:
    """Returns a protocol buffer's value as JSON, of which a legacy Value has one of three kinds."""
    if isinstance(message, pb.Value):
        return getattr(message, message.WhichOneof("value"))
    if isinstance(message, struct_pb2.Value) and message.WhichOneof("kind") == "number_value":
        return message.number_value
    return json_format.MessageToDict(message)


def fill_placeholders(text: str, inputs: pb.ExecutorInput) -> str:
    """Puts values in the place of `{{$}}`, the whole ExecutorInput, and of `{{$.inputs...}}` and `{{$.outputs...}}`.

    Raises:
      ValueError: for a placeholder whose value is not there, or that TFX does not write.
    """

    def fill(match: re.Match[str]) -> str:
        if match.group() == "{{$}}":
            return json_format.MessageToJson(inputs, indent=None)
        known = re.fullmatch(r"\{\{\$\.(inputs|outputs)\.(artifacts|parameters)\['([^']+)'\](.*)\}\}", match.group())
        require(known, "a placeholder that TFX writes", match.group())
        side, kind, key, rest = known.groups()
        values = getattr(getattr(inputs, side), kind)
        if side == "inputs" and kind == "parameters" and key not in values:
            values = inputs.inputs.parameter_values
        require(key in values, f"a value for {match.group()}", sorted(values))
        if kind == "parameters":
            return values[key].output_file if rest == ".output_file" else str(plain(values[key]))
        (artifact,) = values[key].artifacts
        field = re.fullmatch(r"\.metadata\['([^']+)'\]", rest)
        require(rest == ".uri" or (field and field[1] in artifact.metadata), f"a field of `{key}`", match.group())
        return artifact.uri if rest == ".uri" else str(artifact.metadata[field[1]])

    return re.sub(r"\{\{\$.*?\}\}", fill, text)


def artifact_filter(text: str) -> Callable[[Artifact], bool]:
    """Reads the query of a resolver: `FIELD=VALUE`, `metadata.KEY.number_value=VALUE` and `in_context(VALUE)`, joined by AND.

    Returns:
      A function that tells whether an artifact matches.

    Raises:
      ValueError: for any other query, which the service may well understand.

    Source: the filter of MetadataService.ListArtifacts.
    """
    term = r'(?:([\w.]+)\s*=\s*|in_context\()("[^"]*"|[\w.+-]+)\)?'
    require(re.fullmatch(f"{term}(?: AND {term})*", text), "a filter of `field=value` joined by AND", text)
    tests: list[tuple[list[str], str]] = []
    for field, value in re.findall(term, text):
        path = field.split(".") if field else ["contexts"]
        is_metadata = len(path) == 3 and path[0] == "metadata" and path[2] in ("number_value", "string_value")
        require(is_metadata or field in ("", "schema_title", "state", "name", "uri"), "a field of an artifact", field)
        tests.append((path, value.strip('"')))

    def matches(artifact: Artifact) -> bool:
        for path, value in tests:
            if path[0] == "contexts":
                is_match = value in artifact.contexts
            elif path[0] == "metadata":
                actual = artifact.metadata.get(path[1])
                wanted = float(value) if path[2] == "number_value" else value
                is_match = type(actual) is type(wanted) and actual == wanted
            else:
                is_match = getattr(artifact, path[0]) == value
            if not is_match:
                return False
        return True

    return matches


def evaluate_condition(text: str, inputs: pb.ExecutorInput) -> bool:
    """Evaluates a trigger condition: the part of CEL that TFX's `placeholder_to_cel` writes, which has nearly Python's form.

    Raises:
      ValueError: for other CEL, and where CEL has an error: an artifact or key that is not there, values of two types.
    """
    words = {"&&": " and ", "||": " or ", "!": " not "}
    python = re.sub(r"'[^']*'|&&|\|\||!", lambda match: words.get(match.group(), match.group()), text)
    names = {"inputs": json_format.MessageToDict(inputs.inputs)}
    try:
        value = _evaluate(ast.parse(python.strip(), mode="eval").body, names)
    except (SyntaxError, LookupError, TypeError) as error:
        raise ValueError(f"Expected a condition that can be evaluated. Received: {text}: {error!r}.") from error
    require(isinstance(value, bool), "a condition that is true or false", text)
    return value


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op, values):
            return (all if isinstance(op, ast.And) else any)([_evaluate(value, names) for value in values])
        case ast.UnaryOp(ast.Not(), operand):
            return not _evaluate(operand, names)
        case ast.UnaryOp(ast.USub(), operand):
            return -_evaluate(operand, names)
        case ast.Compare(left, [ast.Eq() | ast.Lt() | ast.Gt() as comparison], [right]):
            values = _evaluate(left, names), _evaluate(right, names)
            require(type(values[0]) is type(values[1]), "values of one type to compare", values)
            return {ast.Eq: operator.eq, ast.Lt: operator.lt, ast.Gt: operator.gt}[type(comparison)](*values)
        case ast.BinOp(left, ast.Add(), right):
            return _evaluate(left, names) + _evaluate(right, names)
        case ast.Subscript(value, index):
            return _evaluate(value, names)[_evaluate(index, names)]
        case ast.Attribute(value, name):
            return _evaluate(value, names)[name]
        case ast.Name(name):
            return names[name]
        case ast.Constant(value):
            return value
    raise TypeError(f"{ast.unparse(node)} is not supported")


def require(condition: Any, expected: str, received: Any) -> None:
    """Raises a ValueError where a condition is not met."""
    if not condition:
        raise ValueError(f"Expected {expected}. Received: {str(received).strip()}.")
