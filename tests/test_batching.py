import asyncio
import threading
import time

import pytest

from models.batching import Batcher, QueueFullError
from models.payloads import PreparedImage


class _Model:
    """Answers an image with its own bytes and the batch that it was in; can be held up."""

    def __init__(self, seconds: float = 0.0):
        self.batches: list[list[bytes]] = []
        self.seconds = seconds
        self.was_asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def answer(self, images):
        self.was_asked.set()
        self.gate.wait()
        time.sleep(self.seconds)
        self.batches.append(images)
        return [(image, len(images)) for image in images]


def _images(*names: str, num_pixels: int = 1) -> list[PreparedImage]:
    return [PreparedImage(name.encode(), num_pixels) for name in names]


def _run(scenario, **settings) -> None:
    async def run() -> None:
        batcher = Batcher(**{"max_batch_size": 4, "max_latency_seconds": 0.05, "max_queue": 16, "max_pixels": 100} | settings)
        batcher.start()
        try:
            await asyncio.wait_for(scenario(batcher), 60)
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())


async def _hold(batcher: Batcher, model: _Model) -> asyncio.Task:
    """Keeps the thread busy with one image until the gate opens."""
    model.gate.clear()
    task = asyncio.create_task(batcher.answer(_images("held"), model.answer))
    assert await asyncio.to_thread(model.was_asked.wait, 60)
    assert len(batcher) == 0
    return task


async def _start(*requests) -> list[asyncio.Task]:
    """Starts requests, and returns when all of them are in the queue."""
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)  # a request queues before it waits for anything
    return tasks


def test_batcher_answers_every_image_with_its_own_answer():
    model = _Model()

    async def scenario(batcher):
        held = await _hold(batcher, model)
        requests = [_images(*(f"{number}-{part}" for part in range(number % 3 + 1))) for number in range(50)]
        waiting = await _start(*(batcher.answer(images, model.answer) for images in requests))
        model.gate.set()
        await held
        found = await asyncio.gather(*waiting)
        assert [[answer[0] for answer in one] for one in found] == [[image.encoded for image in one] for one in requests]

    _run(scenario, max_queue=200)
    assert max(map(len, model.batches)) == 4
    assert sum(map(len, model.batches)) == 1 + sum(number % 3 + 1 for number in range(50))


def test_batcher_makes_a_batch_of_what_queued_meanwhile():
    model = _Model()

    async def scenario(batcher):
        held = await _hold(batcher, model)
        waiting = await _start(*(batcher.answer(_images(name), model.answer) for name in "abcdef"))
        model.gate.set()
        await asyncio.gather(held, *waiting)

    _run(scenario)
    assert [len(batch) for batch in model.batches] == [1, 4, 2]


def test_batcher_answers_a_single_client_at_once():
    model = _Model()

    async def scenario(batcher):
        for _ in range(10):
            await batcher.answer(_images("a"), model.answer)

    _run(scenario, max_latency_seconds=600.0)  # more than a scenario may take


async def _answer_three_together(batcher: Batcher, model: _Model) -> None:
    held = await _hold(batcher, model)
    three = await _start(*(batcher.answer(_images(name), model.answer) for name in "abc"))
    model.gate.set()
    await asyncio.gather(held, *three)


def test_batcher_waits_for_clients_that_come_back():
    model = _Model()

    async def scenario(batcher):
        await _answer_three_together(batcher, model)
        again = []
        for name in "def":
            again += await _start(batcher.answer(_images(name), model.answer))
            await asyncio.sleep(0.01)
        await asyncio.gather(*again)

    _run(scenario, max_latency_seconds=600.0)  # more than a scenario may take
    assert [len(batch) for batch in model.batches] == [1, 3, 3]


def test_batcher_waits_no_longer_than_its_bound():
    model = _Model()

    async def scenario(batcher):
        await _answer_three_together(batcher, model)
        started = time.monotonic()
        await batcher.answer(_images("d", "e"), model.answer)
        assert time.monotonic() - started >= 0.2  # a third never came

    _run(scenario, max_latency_seconds=0.2)
    assert [len(batch) for batch in model.batches] == [1, 3, 2]


def test_batcher_refuses_what_does_not_fit_and_takes_it_later():
    model = _Model()

    async def scenario(batcher):
        held = await _hold(batcher, model)
        waiting = await _start(batcher.answer(_images("a", "b", "c"), model.answer))
        with pytest.raises(QueueFullError):
            await batcher.answer(_images("d", "e"), model.answer)
        assert len(batcher) == 3
        assert not batcher.is_full
        waiting += await _start(batcher.answer(_images("f"), model.answer))
        assert batcher.is_full
        model.gate.set()
        await asyncio.gather(held, *waiting)
        assert (await batcher.answer(_images("d", "e"), model.answer))[0][0] == b"d"

    _run(scenario, max_queue=4)


def test_batcher_lets_cancelled_images_leave_the_queue():
    model = _Model()

    async def scenario(batcher):
        held = await _hold(batcher, model)
        gone, stays = await _start(*(batcher.answer(_images(*names), model.answer) for names in ("ab", "c")))
        gone.cancel()
        await asyncio.wait([gone])
        assert len(batcher) == 1
        model.gate.set()
        await asyncio.gather(held, stays)
        assert gone.cancelled()

    _run(scenario)
    assert model.batches == [[b"held"], [b"c"]]


def test_batcher_mixes_no_models_and_bounds_the_pixels_of_a_batch():
    old, new = _Model(), _Model()

    async def scenario(batcher):
        held = await _hold(batcher, old)
        requests = [batcher.answer(_images("a"), old.answer), batcher.answer(_images("b"), new.answer)]
        requests += [batcher.answer(_images(name, num_pixels=60), new.answer) for name in "cd"]
        requests += [batcher.answer(_images("e", num_pixels=1000), new.answer)]  # more than a batch may have: alone
        tasks = await _start(*requests)
        old.gate.set()
        await asyncio.gather(held, *tasks)

    _run(scenario, max_batch_size=8)
    assert old.batches == [[b"held"], [b"a"]]
    assert new.batches == [[b"b", b"c"], [b"d"], [b"e"]]


def test_batcher_lives_on_after_a_model_that_fails():
    def fail(images):
        raise OSError("planted")

    async def scenario(batcher):
        (error,) = await batcher.answer(_images("a"), fail)
        assert isinstance(error, OSError)
        (error,) = await batcher.answer(_images("a"), lambda images: [])
        assert "1 images got 0 answers" in str(error)
        assert (await batcher.answer(_images("a"), _Model().answer))[0] == (b"a", 1)

    _run(scenario)


def test_batcher_answers_what_is_queued_before_it_closes():
    model = _Model(0.01)

    async def run() -> list:
        batcher = Batcher(max_batch_size=1, max_latency_seconds=0, max_queue=8, max_pixels=9)
        batcher.start()
        tasks = [asyncio.create_task(batcher.answer(_images(name), model.answer)) for name in "abc"]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        return await asyncio.gather(*tasks)

    assert [answers[0][0] for answers in asyncio.run(run())] == [b"a", b"b", b"c"]
