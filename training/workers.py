"""Where the work of `index` is done: in this process, in several, or on a Ray cluster.

Each gives a `Spread`: as the builtin `map`, results in order, whoever worked on them.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click

Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Items under way, for each worker: enough that none waits while a long Series is decoded
# ahead of short ones, few enough for the memory that their results take.
AHEAD = 4


def opened(count: int, ray: str | None = None) -> AbstractContextManager[Spread]:
    """Give the `Spread` over that many processes, or over the Ray cluster at an address."""
    if ray is not None:
        return ray_cluster(ray, count)
    return processes(count) if count > 1 else inline()


@contextmanager
def inline() -> Iterator[Spread]:
    """Work in this process."""
    yield map


@contextmanager
def processes(count: int) -> Iterator[Spread]:
    """Work in processes of this machine."""
    # Not forked: the parent has threads, of its progress bar and of its libraries.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context)
    try:
        yield lambda function, items: _in_order(
            lambda item: pool.submit(function, item),
            lambda future: future.result(),
            items,
            AHEAD * count,
        )
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def ray_cluster(address: str, count: int) -> Iterator[Spread]:
    """Work on a Ray cluster; "local" starts one of `count` CPUs for as long as it is used.

    Each of its machines needs this package, and sees the archive under the same path.

    Raises
    ------
    click.ClickException
        If Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a hospital's machines do not call home
    try:
        import ray
    except ImportError as exc:
        raise click.ClickException(
            "--ray needs Ray, which is not installed: pip install 'dicomnode-ssbr[ray]'"
        ) from exc
    own = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise click.ClickException(f"no Ray cluster at {address!r}: {exc}") from exc
    try:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))

        def spread(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            def work(item: Any) -> Any:  # what Ray takes: a function, no `partial`
                return function(item)

            return _in_order(ray.remote(work).remote, ray.get, items, AHEAD * cpus)

        yield spread
    finally:
        ray.shutdown()


def _in_order(
    submit: Callable[[Any], Any], result: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= ahead:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())
