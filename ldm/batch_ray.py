"""A list of requests on Ray Data: actors hold the model, and Ray starts and replaces them on one or many machines."""

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldm import jobs
from ldm.batch import Entry, Finisher, PictureMaker, Row
from ldm.placement.memory import Placement
from ldm.record import ModelChoice

BLOCKS = 10_000  # the most tasks: a task that is lost with its actor is done again
Spread = Callable[[list[list[Entry]]], Iterator[Row]]


class _Actor:
    """A process of Ray that loads the model for its first group, and makes the pictures of one group after the other.

    All values come with the group: Ray may lose the arguments of a constructor before it replaces an actor.
    """

    def __init__(self) -> None:
        self.make: PictureMaker | None = None

    def __call__(self, item: dict[str, Any]) -> list[dict[str, str]]:
        choice, placement, folder, finishing, group = pickle.loads(item["group"])
        if self.make is None:
            self.make = PictureMaker(choice, placement, jobs.load_models(choice, placement), folder, finishing())
        return [{"row": json.dumps(row)} for row in self.make(group)]


def spread(
    choice: ModelChoice,
    placement: Placement,
    folder: Path,
    *,
    address: str | None,
    actors: int,
    finishing: Callable[[], Finisher],
) -> Spread:
    """Return a function that makes groups on Ray Data, for `ldm.batch.run`.

    address: of a running cluster; None: Ray starts on this machine, for this process. All machines need the project,
    the files of the model, and `folder`.
    finishing: makes in each actor what finishes its pictures; must be picklable.
    actors: at most as many processes hold the model. Each takes a GPU, if the cluster has GPUs.
    An actor that dies is replaced, and its task is done again. This process alone writes the manifest.
    Raises ValueError without the package ray.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs the package ray: pip install 'ldm[ray]'") from error

    def make(pending: list[list[Entry]]) -> Iterator[Row]:
        if not pending:
            return
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
        try:
            gpus = ray.cluster_resources().get("GPU", 0) > 0
            items = [
                {"group": pickle.dumps((choice, placement, folder.resolve(), finishing, group))} for group in pending
            ]
            data = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).flat_map(
                _Actor, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors), num_gpus=int(gpus)
            )
            for result in data.iter_rows():
                yield json.loads(result["row"])
        finally:
            ray.shutdown()

    return make
