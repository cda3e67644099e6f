#!/usr/bin/env python3
"""Writes functions.order: which functions conversions run, the busiest first.

Usage: order-functions.py path/to/swimg path/to/its/link.map

The linker puts them side by side, so that a run touches a fifth of the pages of a program that is mostly Swift's
runtime and the parser of its command line. First come those that a longer conversion runs more often, so that the
pages that are needed all the time are few. A function that is not on the list works as well, only further away:
make it anew (`make order`) when much has changed. Counted by valgrind's callgrind: how fast the machine is, and how
busy, changes little.
"""

import bisect
import collections
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile

MIB = 1 << 20
# Code that was compiled without a section for each function moves as a whole or not at all.
LARGEST_SECTION = 16 << 10
# Parts of a short and of a long disk.
SHORT, LONG = 1, 6
# A line of lld's map: address, load address, size, alignment, then a section or a file's part of it.
MAP_LINE = re.compile(r"\s*([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)\s+\d+ (\s*)(\S.*)")

RUNS = """
    --version
    convert -m 8 -W -f qcow2 -O raw plain.qcow2 target
    convert -m 8 -W -f raw -O qcow2 disk.raw target
    convert -m 8 -W -f qcow2 -O qcow2 plain.qcow2 target
    convert -O raw disk.raw target
    convert -m 8 -W -f qcow2 -O raw zlib.qcow2 target
    convert -m 8 -W -f qcow2 -O raw zstd.qcow2 target
    convert -c -O qcow2 disk.raw target
    convert -c -O qcow2 -o compression_type=zstd disk.raw target
    convert -c -O qcow2 -o compression_level=1 disk.raw target
    convert -O raw overlay.qcow2 target
    info plain.qcow2
    map --output=json plain.qcow2
    check plain.qcow2
    compare plain.qcow2 disk.raw
    create -f qcow2 target 1G
    measure -O qcow2 plain.qcow2
"""


def make_images(parts):
    """In the current folder, for a disk of so many parts, each with text, zeros, noise and a hole."""
    rng = random.Random(1)
    words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(500)]
    text = b"".join(rng.choices(words, k=600_000))[: 3 * MIB]
    with open("disk.raw", "wb") as disk:
        for part in range(parts):
            disk.seek(part * 16 * MIB)
            disk.write(text + bytes(MIB) + rng.randbytes(MIB) + text)
        disk.truncate(parts * 16 * MIB)
    for name, options in {
        "plain": ["-O", "qcow2"],
        "zlib": ["-O", "qcow2", "-c"],
        "zstd": ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    }.items():
        subprocess.run(["qemu-img", "convert", *options, "disk.raw", f"{name}.qcow2"], check=True)
    create = "qemu-img create -q -f qcow2 -F qcow2 -b plain.qcow2 overlay.qcow2"
    subprocess.run(create.split(), check=True)


def instructions(program, arguments):
    """How many instructions each of the program's own functions ran."""
    pathlib.Path("target").unlink(missing_ok=True)
    subprocess.run(
        [
            *"valgrind -q --tool=callgrind --demangle=no --compress-strings=no --compress-pos=no".split(),
            "--callgrind-out-file=counts", program, *arguments,
        ],
        check=True, stdout=subprocess.DEVNULL)
    counts = collections.Counter()
    owner = function = ""
    is_call = False
    for line in open("counts"):
        if line.startswith("ob="):
            owner = line[3:].strip()
        elif line.startswith("fn="):
            # A recursive function has a count for each depth.
            function = re.sub(r"'\d+$", "", line[3:].strip())
        elif line.startswith("calls="):
            is_call = True
        elif line[0].isdigit():
            # What follows a call are the instructions of the callee.
            if not is_call and owner == program:
                counts[function] += int(line.split()[-1])
            is_call = False
    return counts


def movable(program, link_map):
    """The functions that have a small section for themselves and a name that no other has."""
    starts, sizes = [], []
    section = ""
    for line in open(link_map):
        if not (match := MAP_LINE.fullmatch(line.rstrip("\n"))):
            continue
        address, size, indent, name = match.groups()
        if not indent:
            section = name
        elif section == ".text" and len(indent) == 8:
            starts.append(int(address, 16))
            sizes.append(int(size, 16))
    names = collections.defaultdict(list)
    for line in subprocess.check_output(["nm", program], text=True).splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] in "tTwW":
            names[fields[2]].append(int(fields[0], 16))
    return {
        name
        for name, addresses in names.items()
        if len(addresses) == 1
        and sizes[bisect.bisect_right(starts, addresses[0]) - 1] <= LARGEST_SECTION
    }


def main():
    program, link_map = map(os.path.abspath, sys.argv[1:])
    result = pathlib.Path(__file__).resolve().parent / "functions.order"
    candidates = movable(program, link_map)
    with tempfile.TemporaryDirectory() as folder:
        # As valgrind will name it.
        folder = os.path.realpath(folder)
        os.chdir(folder)
        # Valgrind does not understand all debug information of the Swift compiler.
        stripped = os.path.join(folder, "swimg")
        subprocess.run(["strip", "-g", "-o", stripped, program], check=True)
        for parts in (SHORT, LONG):
            os.mkdir(f"{folder}/{parts}")
            os.chdir(f"{folder}/{parts}")
            make_images(parts)
        shares, growth = collections.Counter(), collections.Counter()
        for run in RUNS.strip().splitlines():
            os.chdir(f"{folder}/{SHORT}")
            before = instructions(stripped, run.split())
            os.chdir(f"{folder}/{LONG}")
            counts = instructions(stripped, run.split())
            whole = sum(counts.values())
            for function in candidates & counts.keys():
                shares[function] += counts[function] / whole
                # What differs a little does so by chance.
                if counts[function] > 1.3 * before[function] + 200:
                    growth[function] += (counts[function] - before[function]) / whole
        os.chdir("/")
    if not growth:
        raise SystemExit("nothing was counted")
    # In steps, and by name within one: what differs from run to run shall not change the list.
    def rank(name):
        share = growth[name] or shares[name]
        return name not in growth, -math.floor(math.log2(share)), name

    ordered = sorted(shares, key=rank)
    result.write_text("# Made by order-functions.py.\n" + "".join(f"{name}\n" for name in ordered))
    print(f"{len(ordered)} functions, {len(growth)} of them all the time")


if __name__ == "__main__":
    main()
