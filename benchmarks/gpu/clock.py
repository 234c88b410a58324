"""Times of operations on a device, without the host's time to launch them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from autopeft.evaluators.costs.timing import now

#: Most calls in a graph: enough that the time between two replays is negligible.
MOST_CALLS = 200
#: Target seconds of a graph, and of all its replays.
GRAPH_S, ALL_S = 4e-3, 0.25
MIN_REPLAYS, MAX_REPLAYS = 5, 25


def device_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Measure the seconds of one call, the median over replays of a CUDA graph of calls.

    `calls` do the same work on inputs of their own, in turns: with one set of inputs that fits in the cache, the cache
    would be measured. Without CUDA: by the host's clock. Raises RuntimeError where a call waits for the device.
    """
    for call in calls:
        call()  # compiles, and loads libraries
    alone = [seconds_of(call, device) for call in calls]
    if device.type != "cuda":
        return statistics.median(alone)
    # Checked first: a failed capture leaves torch's allocator and random streams in another state.
    _check_waits(calls[0])
    about = min(alone)
    number = max(len(calls), min(MOST_CALLS, round(GRAPH_S / about)))

    def work() -> None:
        for index in range(number):
            calls[index % len(calls)]()

    replay = capture(work, device)
    taken = []
    for _ in range(2 + max(MIN_REPLAYS, min(MAX_REPLAYS, round(ALL_S / (number * about))))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize(device)
        elapsed_ms: float = begin.elapsed_time(end)
        taken.append(1e-3 * elapsed_ms / number)
    return statistics.median(taken[2:])


def capture(work: Callable[[], object], device: torch.device, warm_ups: int = 1) -> Callable[[], None]:
    """Capture `work` as a CUDA graph and return the function that replays it. The graph owns what `work` allocates.

    `work` first runs `warm_ups` times, on a stream of its own as a capture requires. It must not wait for the device:
    after a failed capture the process cannot capture again.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def _check_waits(call: Callable[[], object]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Measure the seconds of one call by the host's clock, including the launch: the median of `repeats`."""
    for _ in range(2):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of one call by the host's clock, until the device is done."""
    begin = now(device)
    call()
    return now(device) - begin
