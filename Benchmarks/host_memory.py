"""Keeps the free memory of a virtual machine while a benchmark runs.

A kernel that reports free pages to its host loses them, and gets each of them back by a fault in the
host, which takes longer than all that is measured here. How many a run meets is luck, so nothing is
reported meanwhile. Needs root, and does nothing on machines that keep their memory anyway.
"""

import contextlib

FOLDER = "/sys/module/page_reporting/parameters"
# The largest order of a free block is 10. The second parameter is not in every kernel.
QUIET = {"page_reporting_order": "11", "free_bitmap_enable": "N"}


@contextlib.contextmanager
def kept():
    """Yields whether the machine keeps its memory."""
    before = {}
    try:
        for name, value in QUIET.items():
            with contextlib.suppress(FileNotFoundError), open(f"{FOLDER}/{name}", "r+") as file:
                before[name] = file.read().strip()
                file.seek(0)
                file.write(value)
        yield True
    except PermissionError:
        yield False
    finally:
        for name, value in before.items():
            with contextlib.suppress(OSError), open(f"{FOLDER}/{name}", "w") as file:
                file.write(value)
