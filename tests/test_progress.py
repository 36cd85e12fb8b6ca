import pytest
from conftest import messages_of

from models import progress as module
from models.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_progress_logs_a_bar_the_speed_and_the_time_left(clock, caplog):
    progress = Progress("embedding train", total=200)

    clock[0] += 1
    assert not progress.advance(10)  # too soon
    clock[0] += 3
    with caplog.at_level("INFO", logger="tfx_vision"):
        assert progress.advance(40, note="val accuracy 0.9")

    assert messages_of(caplog) == ["embedding train ━━━━━───────────────  25% · 12 images/s · 12 s left · val accuracy 0.9"]


def test_progress_leaves_out_of_the_speed_what_an_earlier_run_did(clock):
    progress = Progress("fine-tuning", total=1000, done=500)

    clock[0] += 10
    progress.advance(100)

    assert progress.images_per_second == pytest.approx(10)
    assert progress.line() == "━━━━━━━━━━━━────────  60% · 10 images/s · 40 s left"


def test_progress_at_its_end_has_no_time_left(clock):
    progress = Progress("head", total=50)

    clock[0] += 5
    progress.advance(50)

    assert progress.line() == "━━━━━━━━━━━━━━━━━━━━ 100% · 10 images/s"


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (89, "89 s"), (120, "2 min"), (5300, "88 min"), (9000, "2.5 h")])
def test_progress_names_times_as_people_do(clock, seconds, text):
    progress = Progress("head", total=1 + seconds)

    clock[0] += 1
    progress.advance(1)

    assert progress.line().endswith(f" · {text} left")
