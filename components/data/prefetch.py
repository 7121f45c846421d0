"""Prefetching of micro-batches to the device, one ahead of the step that uses them."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.contracts import Batch, Posterior
from components.data.loader import Loaded
from components.data.pixels import to_float

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader


class Prefetcher:
    """Iterates over a loader in a background thread and keeps the next micro-batch ready on the device.

    Yields ``(batch, beside, unreadable)``: a :class:`components.contracts.Batch`, the result of ``beside``, and the
    paths of unreadable files that were replaced. Exceptions in the loader or in ``beside`` are re-raised by ``next``
    with their original traceback. Create it in the main thread (PyTorch detects killed workers only there), and use it
    as a context manager or call :meth:`close`.

    Device memory: one float micro-batch in addition to the one in use.

    Args:
        loader: from :func:`make_loader`.
        device: device of the batches.
        beside: called in the thread with the stream position of each micro-batch's first sample, for example to draw
            the micro-batch's random numbers. CPU tensors in its result (also inside tuples, dicts and dataclasses) are
            copied to the device, through pinned memory if it is a GPU.

    Attributes:
        waited_s: total time in seconds that ``next`` has waited for data.
    """

    def __init__(
        self, loader: StatefulDataLoader, device: torch.device | str, beside: Callable[[int], Any] | None = None
    ) -> None:
        self.device = torch.device(device)
        self.waited_s = 0.0
        self._cuda = self.device.type == "cuda"
        if self._cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._beside = beside
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._closed = False
        self._end: BaseException | None = None
        self._positions = loader.batch_sampler.positions()
        self._batches = iter(loader)  # starts the workers
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> tuple[Batch, Any, list[str]]:
        if self._closed:
            raise StopIteration
        if self._end is not None:
            raise self._end
        start = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._end = item
            raise item
        self._room.release()
        batch, beside, unreadable, copied = item
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in _tensors((batch, beside)):
                if tensor.is_cuda:
                    # Allocated on the side stream, which could otherwise reuse the memory while this stream needs it.
                    tensor.record_stream(current)
        return batch if self._cuda else _to_batch(batch), beside, unreadable

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and the workers; hanging workers are terminated after a few seconds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._room.release()
        self._thread.join(timeout=2)
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            # A new thread uses device 0, where even pinning memory would create a CUDA context.
            with torch.cuda.device(self.device) if self._cuda else contextlib.nullcontext():
                for loaded, position in zip(self._batches, self._positions):
                    self._room.acquire()
                    if self._closed:
                        break
                    self._ready.put(self._prepare(loaded, position))
        except BaseException as error:
            end = error
        self._ready.put(end)

    def _prepare(self, loaded: Loaded, position: int) -> tuple[Batch | Loaded, Any, list[str], torch.cuda.Event | None]:
        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            # On a CPU the consumer converts the batch: a parallel operation in this thread would start a second OpenMP
            # thread pool, whose busy waiting takes cores from training.
            batch = _to_batch(_map(loaded, self._copy)) if self._cuda else loaded
            beside = None if self._beside is None else _map(self._beside(position), self._copy)
            return batch, beside, loaded.unreadable, self._stream.record_event() if self._cuda else None

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._cuda and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # no-op if already pinned; copies from pageable memory are synchronous
        return tensor.to(self.device, non_blocking=True)


def _to_batch(loaded: Loaded) -> Batch:
    """Convert uint8 images to float in [-1, 1] and cached tensors to fp32."""
    images = None if loaded.images is None else to_float(loaded.images)
    if loaded.cached is None:
        return Batch(images, loaded.condition)
    mean, std, features = _map(loaded.cached, Tensor.float)
    return Batch(images, loaded.condition, Posterior.from_std(mean, std), features)


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``fn`` to every tensor in nested tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _map(item, fn) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_map(item, fn) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value):
        return type(value)(**{key: _map(item, fn) for key, item in vars(value).items()})
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))
