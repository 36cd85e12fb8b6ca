import pydantic
import pytest

from data.errors import (
    EXIT_DATA_GATE,
    EXIT_FAILED,
    EXIT_WRONG_INPUT,
    DataAnomalyError,
    InputError,
    exit_code,
    report_error,
    validate,
)


class _Colour(pydantic.BaseModel):
    red: int = pydantic.Field(ge=0, le=255)


class _Picture(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    colour: _Colour
    name: str = "untitled"

    @pydantic.model_validator(mode="after")
    def _have_a_name(self):
        if not self.name:
            raise ValueError("Expected `name` to be set. Received: nothing. Give it one.")
        return self


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (DataAnomalyError("odd"), 4),
        (DataAnomalyError("odd", "odder"), 4),
        (RuntimeError("broken"), 1),
        (ValueError("broken"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_code_tells_the_user_s_errors_from_ours(error, code):
    assert exit_code(error) == code


def test_exit_codes_are_those_that_scripts_rely_on():
    assert (EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_DATA_GATE) == (1, 2, 4)


def test_report_error_prints_one_line_to_standard_error(capsys):
    code = report_error(InputError("Expected a. Received: b.\n"), debug=False)

    captured = capsys.readouterr()
    assert code == 2
    assert captured.err == "error: Expected a. Received: b.\n"
    assert captured.out == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("KeyboardInterrupt [while running 'Read and check']")])
def test_report_error_says_that_ctrl_c_was_no_failure(error, capsys):
    assert report_error(error, debug=False) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_report_error_prints_each_finding_and_then_what_to_do(capsys):
    error = DataAnomalyError("height is 0", "label is 'x'")
    error.add_note("Mend the data.")

    assert report_error(error, debug=False) == 4
    assert capsys.readouterr().err == "error: height is 0\nlabel is 'x'\nMend the data.\n"


def test_report_error_names_the_class_of_an_error_without_a_message(capsys):
    assert report_error(MemoryError(), debug=False) == 1
    assert capsys.readouterr().err == "error: MemoryError\n"


def test_report_error_shows_the_traceback_for_debugging(capsys):
    def fail():
        raise InputError("the message")

    with pytest.raises(InputError) as caught:
        fail()

    assert report_error(caught.value, debug=True) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "in fail" in printed
    assert "the message" in printed


def test_validate_returns_the_settings():
    picture = validate(_Picture, {"colour": {"red": 255}})

    assert picture == _Picture(colour=_Colour(red=255), name="untitled")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"colour": {"red": 256}},
            "Expected `colour.red` to be valid. Received: colour.red=256. Input should be less than or equal to 255.",
        ),
        (
            {"colour": {"red": "much"}},
            "Expected `colour.red` to be valid. Received: colour.red='much'. "
            "Input should be a valid integer, unable to parse string as an integer.",
        ),
        ({"colour": {"red": 1}, "name": ""}, "Expected `name` to be set. Received: nothing. Give it one."),
    ],
)
def test_validate_names_the_setting_and_its_value_in_one_line(values, message):
    with pytest.raises(InputError) as caught:
        validate(_Picture, values)

    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)
