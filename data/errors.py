"""The errors that a command answers in one line, and the exit codes, the same for every command.

Called by every command and by whatever reads what a user wrote.
"""

import sys
import traceback
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

Model = TypeVar("Model", bound=pydantic.BaseModel)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_NOT_BLESSED = 3
EXIT_DATA_GATE = 4
EXIT_INTERRUPTED = 130  # as a shell has it for Ctrl-C


class InputError(ValueError):
    """The user's input or configuration is wrong."""


class DataAnomalyError(RuntimeError):
    """The data does not obey its schema; the data gate has stopped the run. Each argument is a finding, a sentence."""

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.args)


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error."""
    if isinstance(error, InputError):
        return EXIT_WRONG_INPUT
    if _is_interrupt(error):
        return EXIT_INTERRUPTED
    return EXIT_DATA_GATE if isinstance(error, DataAnomalyError) else EXIT_FAILED


def report_error(error: BaseException, *, debug: bool) -> int:
    """Prints an error to standard error, short with its notes or with its traceback, and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    else:
        message = "interrupted" if _is_interrupt(error) else str(error).strip() or type(error).__name__
        print(f"error: {message}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
    return exit_code(error)


def _is_interrupt(error: BaseException) -> bool:
    """Tells whether it was Ctrl-C, also in a worker of Beam, which makes an error of its own that begins with the name."""
    return isinstance(error, KeyboardInterrupt) or str(error).startswith(f"{KeyboardInterrupt.__name__} [while running ")


def validate(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Validates settings.

    Raises:
      InputError: one line that names the first wrong setting.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not message.startswith("Expected "):
            name = ".".join(str(part) for part in first["loc"])
            message = f"Expected `{name}` to be valid. Received: {name}={first['input']!r}. {message}."
        raise InputError(message) from error
