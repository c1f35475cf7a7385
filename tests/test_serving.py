"""A pipeline that several threads, or the tasks of an asyncio program, use at once."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ldm
from ldm.serving import BusyError, Served

DOCS = Path(__file__).parent.parent / "docs" / "operate.md"


def requests(count=8):
    changes = [{}, {"emphasis": "interpolate"}, {"sampler": "euler_ancestral"}, {"guidance_scale": 1.0}]
    return [
        ldm.Request(f"a (cat:1.{i})", seed=i, steps=2, width=32, height=32, **changes[i % len(changes)])
        for i in range(count)
    ]


@pytest.mark.parametrize("placed", [{}, {"attention": "sliced"}, {"packed": True}, {"guidance": "sequential"}])
def test_eight_threads_make_the_pictures_that_one_makes(model_folder, placed):
    try:
        pipe = ldm.load(model_folder, ldm.Placement(device="cpu", **placed))
    except ValueError as error:
        pytest.skip(str(error))
    alone = [pipe.generate(request)[0].tobytes() for request in requests()]
    with ThreadPoolExecutor(8) as pool:
        together = [pictures[0].tobytes() for pictures in pool.map(pipe.generate, requests())]
    assert together == alone


def test_tasks_get_the_pictures_of_the_pipeline_and_see_each_step(pipe):
    async def main():
        served, seen = Served(pipe, threads=2), []
        made = await asyncio.gather(*(served.generate(r, on_step=seen.append) for r in requests(4)))
        served.close()
        return [pictures[0].tobytes() for pictures in made], len(seen)

    made, seen = asyncio.run(main())
    assert made == [pipe.generate(request)[0].tobytes() for request in requests(4)]
    assert seen >= 4 * 2


def test_a_full_queue_makes_a_task_wait_or_tells_it_so(pipe):
    async def main():
        served = Served(pipe, waiting=1)
        running = [asyncio.create_task(served.generate(r)) for r in requests(2)]
        await asyncio.sleep(0)
        assert served.full
        with pytest.raises(BusyError, match="the queue is full"):
            await served.generate(requests(1)[0], wait=False)
        waited = await served.generate(requests(1)[0])
        assert all(task.done() for task in running[:1])
        await asyncio.gather(*running)
        served.close()
        return waited[0].tobytes()

    assert asyncio.run(main()) == pipe.generate(requests(1)[0])[0].tobytes()


def test_a_cancelled_task_stops_after_the_step_and_frees_its_place(pipe):
    long = ldm.Request("a cat", steps=500, width=32, height=32)

    async def main():
        served, steps, first = Served(pipe, waiting=0), [], asyncio.Event()

        def on_step(step):
            steps.append(step.index)
            first.set()

        task = asyncio.create_task(served.generate(long, on_step=on_step))
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(steps) < 400
        assert not served.full
        assert threading.active_count() < 20
        after = await served.generate(requests(1)[0])
        served.close()
        return after[0].tobytes()

    assert asyncio.run(main()) == pipe.generate(requests(1)[0])[0].tobytes()


def test_an_error_of_the_run_reaches_the_task(pipe):
    async def main():
        served = Served(pipe)
        with pytest.raises(ValueError, match="width must be a multiple"):
            await served.generate(ldm.Request("a cat", width=33))
        served.close()

    asyncio.run(main())


@pytest.mark.parametrize(("waiting", "threads"), [(-1, 1), (1, 0)])
def test_wrong_numbers_are_refused(pipe, waiting, threads):
    with pytest.raises(ValueError, match="waiting must be at least 0 and threads at least 1"):
        Served(pipe, waiting=waiting, threads=threads)


def test_the_code_of_the_docs_runs(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "Served" in block)
    code = code.replace("ldm.load()", f"ldm.load({str(model_folder)!r})").replace('grass")', 'grass", steps=1)')
    exec(compile(code, "docs/operate.md", "exec"), {})
    assert (tmp_path / "frog.png").is_file()
