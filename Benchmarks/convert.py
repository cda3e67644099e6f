#!/usr/bin/env python3
"""Times swimg against qemu-img, pair by pair in one run, on an 8 GiB disk with 3.4 GiB of real files.

Usage: convert.py path/to/swimg [--folder DIR] [--rounds N] [--only WORD]

Absolute times depend on the machine and on what else it does; the ratio of two runs that follow each
other does not. So the two programs take turns, each going first in every other round, and what counts
is the median of the ratios. Sources are in the page cache, targets are new, what the last run left to
be written is on disk before the next one starts, and memory for the target is fetched beforehand (see
`fetch_memory`). Every result is judged once: `qemu-img compare` and `qemu-img check`.
"""

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time

DISK_SIZE = 8 << 30
FILE_BYTES = 3_400_000_000
TARGET_MEMORY = 4 << 30

# name, source, source format, target format, options
CASES = [
    ("raw to qcow2", "disk.raw", "raw", "qcow2", []),
    ("qcow2 to raw", "disk.qcow2", "qcow2", "raw", []),
    ("raw to raw", "disk.raw", "raw", "raw", []),
    ("qcow2 to qcow2", "disk.qcow2", "qcow2", "qcow2", []),
    ("zlib qcow2 to raw", "zlib.qcow2", "qcow2", "raw", []),
    ("zstd qcow2 to raw", "zstd.qcow2", "qcow2", "raw", []),
    ("raw to zlib qcow2", "disk.raw", "raw", "qcow2", ["-c"]),
    ("raw to zstd qcow2", "disk.raw", "raw", "qcow2", ["-c", "-o", "compression_type=zstd"]),
]


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_disk(path):
    """An ext4 file system with files of this machine, of all kinds and sizes."""
    print(f"making {path} ...", file=sys.stderr)
    folder = os.path.dirname(path)
    with tempfile.TemporaryDirectory(dir=folder) as files:
        total = 0
        for root in ["/usr", "/opt"]:
            for place, _, names in os.walk(root):
                target = files + place
                made = False
                for name in names:
                    source = os.path.join(place, name)
                    if os.path.islink(source) or not os.access(source, os.R_OK):
                        continue
                    size = os.path.getsize(source)
                    if size > 512 << 20 or total + size > FILE_BYTES:
                        continue
                    if not made:
                        os.makedirs(target, exist_ok=True)
                        made = True
                    run("cp", source, target)
                    total += size
        if total < 3 << 30:
            sys.exit(f"this machine has only {total} bytes of files under /usr and /opt")
        temporary = path + ".tmp"
        with open(temporary, "wb") as file:
            file.truncate(DISK_SIZE)
        run("mkfs.ext4", "-q", "-F", "-d", files, temporary)
        run("cp", "--sparse=always", temporary, path)
        os.unlink(temporary)


def prepare(folder):
    disk = f"{folder}/disk.raw"
    if not os.path.exists(disk):
        make_disk(disk)
    for name, options in [
        ("disk", []),
        ("zlib", ["-c"]),
        ("zstd", ["-c", "-o", "compression_type=zstd"]),
    ]:
        path = f"{folder}/{name}.qcow2"
        if not os.path.exists(path):
            print(f"making {path} ...", file=sys.stderr)
            command = ["qemu-img", "convert", "-m", "8", "-W", "-f", "raw", "-O", "qcow2"]
            run(*command, *options, disk, path + ".tmp")
            os.rename(path + ".tmp", path)


def fetch_memory(size):
    """Touches and frees this much memory.

    A virtual machine may have given its free pages back to the hypervisor; the first touch of such a
    page then takes up to twenty times as long as that of another, and whoever writes the next target pays.
    """
    with mmap.mmap(-1, size) as memory:
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1


def measure(program, arguments, target):
    """Seconds and peak memory in KiB of one conversion."""
    if os.path.exists(target):
        os.unlink(target)
    os.sync()
    fetch_memory(TARGET_MEMORY)
    with tempfile.NamedTemporaryFile() as report:
        # GNU time is small: a process forked from here would start with Python's memory as its peak.
        start = time.monotonic()
        run("/usr/bin/time", "-o", report.name, "-f", "%M", program, *arguments, target)
        seconds = time.monotonic() - start
        return seconds, int(report.read())


def warm(path):
    """Brings a file into the page cache, where it mostly is already."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def judge(source, source_format, target, target_format):
    run("qemu-img", "compare", "-f", source_format, "-F", target_format, source, target)
    if target_format != "raw":
        run("qemu-img", "check", "-f", target_format, target)


def taken(path):
    return os.stat(path).st_blocks * 512


def bench(case, swimg, folder, rounds):
    name, source, source_format, target_format, options = case
    source = f"{folder}/{source}"
    arguments = ["convert", "-m", "8", "-W", "-f", source_format, "-O", target_format]
    arguments += options + [source]
    ours, theirs = f"{folder}/out.swimg", f"{folder}/out.qemu"
    times, peaks = ([], []), ([], [])
    turns = [(0, swimg, ours), (1, "qemu-img", theirs)]
    for number in range(rounds):
        for index, program, target in turns if number % 2 == 0 else reversed(turns):
            warm(source)
            seconds, peak = measure(program, arguments, target)
            times[index].append(seconds)
            peaks[index].append(peak)
    judge(source, source_format, ours, target_format)
    ratio = statistics.median(their / our for our, their in zip(*times))
    row = (
        f"| {name} | {statistics.median(times[0]):.2f} s | {statistics.median(times[1]):.2f} s "
        f"| {ratio:.2f} | {max(peaks[0]) / 1024:.1f} | {max(peaks[1]) / 1024:.1f} "
        f"| {taken(ours) / taken(theirs):.3f} |"
    )
    os.unlink(ours)
    os.unlink(theirs)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    swimg = os.path.realpath(options.swimg)
    os.makedirs(options.folder, exist_ok=True)
    prepare(options.folder)
    print(f"{options.rounds} rounds (3 where it compresses), {os.cpu_count()} cores\n")
    print("| case | swimg | qemu-img | times as fast | MiB swimg | MiB qemu-img | space |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if options.only in case[0]:
            # Compressing takes minutes, and varies less.
            rounds = options.rounds if "-c" not in case[4] else min(3, options.rounds)
            print(bench(case, swimg, options.folder, rounds), flush=True)


if __name__ == "__main__":
    main()
