"""How long this machine takes to read so many bytes once: the floor of decoding at batch 1."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import threading
import time


class Reader:
    """Reads memory with all threads, through the C library's vectorised memchr.

    The buffer lies on huge pages where the system gives them. Every thread reads a part of its
    own, searching for a byte that is not there.
    """

    def __init__(self, size: int, threads: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = (ctypes.c_char * size).from_buffer(self._map)
        self._address, self._size, self._threads = ctypes.addressof(self._view), size, threads
        ctypes.memset(self._address, 1, size)  # so that the pages exist
        self._memchr = ctypes.CDLL(ctypes.util.find_library("c")).memchr
        self._memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._memchr.restype = ctypes.c_void_p

    def read(self, size: int) -> float:
        """Read the first ``size`` bytes; the seconds from the common start to the last end."""
        size = min(size, self._size)
        part = -(-size // self._threads)
        ends = [0.0] * self._threads
        starts = list(ends)
        barrier = threading.Barrier(self._threads)

        def work(index: int) -> None:
            begin = index * part
            barrier.wait()
            starts[index] = time.perf_counter()
            self._memchr(self._address + begin, 0, max(0, min(part, size - begin)))
            ends[index] = time.perf_counter()

        workers = [threading.Thread(target=work, args=(i,)) for i in range(self._threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return max(ends) - min(starts)

    def close(self) -> None:
        """Give the memory back."""
        del self._view
        self._map.close()
