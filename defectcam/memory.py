"""Memory that runs out must be an error Python can catch: one photo gets the tag that says so, and the next is served.

Without a limit of its own the process dies instead, of the kernel's out-of-memory killer, and on Nuclio's processor
a dead Python process takes the whole service down.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from defectcam.request import MAX_BODY_BYTES

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers of two parameters of mallopt
KEPT_BLOCK_BYTES, KEPT_BYTES = 32 << 20, 1 << 30  # of a block, older glibcs allow no more
LEAST_BYTES_PER_PX = 30  # of a photo: its pixels, its pyramid and its maps, beside the tiles; up to 40 were measured
# For libraries' code, which must stay in memory, and Nuclio's processor, which holds a request's body twice: as it came,
# and as it goes to this process.
MARGIN_BYTES = (200 << 20) + 2 * MAX_BODY_BYTES


def limit_memory() -> None:
    """Let this process allocate what is left of its container and of the machine, less a margin.

    A lower limit that somebody has set already stays. Does nothing on other systems than Linux.

    Raises:
        MemoryError: less than the margin is left.
    """
    if sys.platform != "linux":
        return
    import resource

    used = _bytes_of("/proc/self/status")
    left = _left_bytes(used)
    if left < MARGIN_BYTES:
        raise MemoryError(
            f"{left / 1e6:.0f} MB of memory are left beside the weights, at least {MARGIN_BYTES / 1e6:.0f} are needed: "
            "give the container more, the README says how much"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)  # what libraries map of their files is not counted
    limits = [used["VmData"] + left - MARGIN_BYTES, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def check_memory(height: int, width: int, bytes_per_px: int = LEAST_BYTES_PER_PX) -> None:
    """Refuse a photo of so many px that cannot fit, before it is decoded.

    It counts on all that this process has freed. So a photo that passes may still run out of memory.

    Raises:
        MemoryError: with the MB that it needs at the least, and those that are left.
    """
    if sys.platform != "linux":
        return
    import resource

    used, (soft, _) = _bytes_of("/proc/self/status"), resource.getrlimit(resource.RLIMIT_DATA)
    left = _left_bytes(used) - MARGIN_BYTES
    if soft != resource.RLIM_INFINITY:
        left = min(left, soft - used["RssAnon"])
    if (needed := height * width * bytes_per_px) > left:
        raise MemoryError(f"out of memory: needs {needed / 1e6:.0f} MB, {left / 1e6:.0f} MB are left")


def _left_bytes(used: dict[str, int]) -> int:
    """What of its container and of the machine a process has left that uses so much, as in /proc/self/status."""
    machine = _bytes_of("/proc/meminfo")
    left = max(machine["MemAvailable"], machine["MemTotal"] // 2)  # who is busy at this start may not be for ever
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.exists() else "max"
        if text != "max":
            left = min(left, int(text) - used["RssAnon"])
    return left


def keep_freed_memory() -> None:
    """Let this process keep blocks of less than KEPT_BLOCK_BYTES when they are freed, until `return_freed_memory`.

    A network asks for the same blocks for one tile after another, and pages new from the system cost a fifth of a
    climb's time. Keeping larger blocks gains little more, and what a heap once held counts against `limit_memory` for
    ever. Does nothing without glibc.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return all that was freed to the system, whatever lies between, before blocks of other sizes are wanted.

    Else each size would add its own: a climb of 4 megapixels that keeps blocks of any size takes 2.4 instead of 1.9 GB.
    Does nothing without glibc.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _bytes_of(path: str) -> dict[str, int]:
    """The sizes in a file of /proc, which has them in kB."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
