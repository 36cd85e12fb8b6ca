"""Progress of whatever takes long, as a line in the log that a runner shows live: a bar, images/s and the time left.

Called by the embeddings and by the training loop.
"""

import logging
import time

logger = logging.getLogger("tfx_vision")

_REPORT_SECONDS = 2.0
_BAR_WIDTH = 20  # characters


class Progress:
    """Counts images and logs a line every two seconds."""

    def __init__(self, name: str, *, total: int, done: int = 0):
        """Starts the clock.

        Args:
          name: what is being done, such as `embedding train`.
          total: images in all.
          done: of them by an earlier run; they do not count for the speed.
        """
        self._name = name
        self._total = total
        self._done = self._first = done
        self._started = self._reported = time.monotonic()

    def advance(self, num_images: int, *, note: str = "") -> bool:
        """Counts images; logs a line if the last one was two seconds ago, and tells whether it did."""
        self._done += num_images
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return False
        self._reported = now
        logger.info("%s %s%s", self._name, self.line(), f" · {note}" if note else "")
        return True

    @property
    def images_per_second(self) -> float:
        """Images/s since the start of this run."""
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """Returns the bar, the share done, images/s and the time left."""
        share = min(self._done / max(self._total, 1), 1.0)
        filled = round(share * _BAR_WIDTH)
        rate = self.images_per_second
        left = f" · {_duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        return f"{'━' * filled}{'─' * (_BAR_WIDTH - filled)} {share:4.0%} · {rate:,.0f} images/s{left}"


def _duration(seconds: float) -> str:
    """Formats seconds as a person says them: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
