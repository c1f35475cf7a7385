"""Simulate a list of a million prompts on 64 GPUs: `python -m tests.benchmarks.fleet` prints the table of operate.md.

The seconds are assumptions, not measurements: they stand at the top of the table. The simulation asks how much time
stragglers, deaths and loading cost if each process has a fixed share of the list (torchrun), and if processes take the
next block of groups when they are free (Ray).
"""

import heapq
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Fleet:
    """The assumptions. Seconds and shares."""

    pictures: int = 1_000_000
    gpus: int = 64
    batch: int = 8  # pictures in a group
    picture: float = 1.5  # seconds of a picture in a group
    spread: float = 0.1  # standard deviation of the logarithm of a group's time
    slow: float = 0.05  # share of the GPUs that are slow
    slowness: float = 2.0  # factor of their times
    load: float = 60.0  # seconds from the start of a process to its first step
    hours_between_deaths: float = 100.0  # of one process


def simulate(fleet: Fleet, groups_in_a_block: int | None, seed: int = 0) -> tuple[float, float]:
    """Return the hours until the last picture, and the share of the GPUs' time that made pictures which were kept.

    groups_in_a_block: the work that a process takes at once, and loses if it dies; None: a fixed share of the list for
    each process, which goes on at the last finished group after a death.
    """
    rng = np.random.default_rng(seed)
    groups = -(-fleet.pictures // fleet.batch)
    factor = np.where(rng.random(fleet.gpus) < fleet.slow, fleet.slowness, 1.0)
    useful = groups * fleet.batch * fleet.picture

    def seconds(gpu: int, count: int) -> float:
        noise = rng.normal(0, fleet.spread / max(count, 1) ** 0.5)
        return count * fleet.batch * fleet.picture * factor[gpu] * float(np.exp(noise))

    def death() -> float:
        return float(rng.exponential(3600 * fleet.hours_between_deaths))

    if groups_in_a_block is None:
        ends = []
        for gpu in range(fleet.gpus):
            work = seconds(gpu, len(range(gpu, groups, fleet.gpus)))
            deaths = rng.poisson(work / (3600 * fleet.hours_between_deaths))
            ends.append(work + (1 + deaths) * fleet.load)
        return max(ends) / 3600, useful / (fleet.gpus * max(ends))
    free = [(fleet.load, gpu) for gpu in range(fleet.gpus)]
    dies = [death() for _ in range(fleet.gpus)]
    left = groups
    end = 0.0
    while left > 0:
        now, gpu = heapq.heappop(free)
        count = min(groups_in_a_block, left)
        done = now + seconds(gpu, count)
        if done > dies[gpu]:  # the block is lost
            now = dies[gpu] + fleet.load
            dies[gpu] = now + death()
            heapq.heappush(free, (now, gpu))
            continue
        left -= count
        end = max(end, done)
        heapq.heappush(free, (done, gpu))
    return end / 3600, useful / (fleet.gpus * end)


def main() -> None:
    """Print the table."""
    fleet = Fleet()
    cases = {
        "as assumed": fleet,
        "no slow GPU": replace(fleet, slow=0.0),
        "a death each 10 hours": replace(fleet, hours_between_deaths=10.0),
        "loading takes 10 minutes": replace(fleet, load=600.0),
    }
    blocks = {"fixed shares (torchrun)": None, "blocks of 1 group": 1, "blocks of 13 groups": 13, "blocks of 500": 500}
    print("| hours, and share of the GPUs' time that made pictures |", " | ".join(blocks), "|")
    print("| --- |" + " --- |" * len(blocks))
    for name, case in cases.items():
        runs = [np.mean([simulate(case, size, seed) for seed in range(3)], axis=0) for size in blocks.values()]
        print(f"| {name} |", " | ".join(f"{hours:.2f}, {100 * share:.0f} %" for hours, share in runs), "|")


if __name__ == "__main__":
    main()
