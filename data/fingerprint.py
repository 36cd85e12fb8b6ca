"""Says whether code has changed, for caches that would not notice by themselves.

TFX's cache key of a component that calls our functions by import path holds the path, not the code behind it, so an edited
`run_fn` would get the old model back. The pipeline therefore passes these fingerprints into each such component, and the
data preparation keeps one beside its records. Called by `data.prepare` and `pipeline.pipeline`.
"""

import ast
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("data", "preprocessing", "models", "pipeline")


def code_fingerprint(module: str, *, distributions: Sequence[str] = ()) -> str:
    """Fingerprints a module of ours, with every module of ours that it imports and the named installed packages.

    Comments and layout do not count: what is hashed is the syntax tree.

    Args:
      module: dotted name, such as `models.trainer`.
      distributions: installed packages whose version counts as code, such as `tensorflow`.

    Returns:
      16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        digest.update(f"{name}\n{ast.dump(_parse(name))}\n".encode())
    for name in distributions:
        digest.update(f"{name}=={importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()[:16]


def imported_modules(module: str) -> set[str]:
    """Returns the modules of ours that a module imports itself, at its top or inside its functions."""
    found = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] in _PACKAGES and _path(name).is_file()}


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(imported_modules(name))
    return seen


def _path(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py")


def _parse(module: str) -> ast.Module:
    return ast.parse(_path(module).read_bytes())
