#!/usr/bin/env python3
"""Times swimg against qemu-img and nbdcopy between two servers on unix sockets.

Usage: nbd.py path/to/swimg [--folder DIR] [--pairs N]

The setup is the one published with nbdcopy (libnbd's commit "copy: Always allow multiple
connections"): two qemu-nbd serve 6 GiB qcow2 disks in memory (/dev/shm); nbdcopy uses 4 connections
with 2 requests of 128 KiB each, and `--flush`. First, each program writes to an empty target, and
the result is compared. Four measurements follow:

1. As published: the programs take turns in random order in each round, and each finds the target as
   the previous one left it, so its clusters are allocated. The first three rounds do not count.
2. Both servers are started for each run, with the same disks. The long requests of one program
   (qemu-img's have 2 MiB) thus cannot teach the server's malloc to keep memory for other programs.
3. The target is also new for each run, so the server must get its memory from the kernel.
4. Each request takes 5 ms, so only the number of requests in flight matters.
"""

import argparse
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import tempfile
import time

from datasets import run

SIZE = 6 << 30


@contextlib.contextmanager
def server(command, socket):
    process = subprocess.Popen(command)
    try:
        while not os.path.exists(socket):
            if process.poll() is not None:
                raise SystemExit(f"failed: {' '.join(command)}")
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()


def qemu_nbd(file, socket, *flags):
    return server(["qemu-nbd", *flags, "-t", "-e", "4", "-f", "qcow2", "-k", socket, file], socket)


def peak_and_time(command):
    with tempfile.NamedTemporaryFile() as report:
        start = time.monotonic()
        run("/usr/bin/time", "-o", report.name, "-f", "%M", *command)
        return time.monotonic() - start, int(report.read())


def programs(swimg, source, target):
    return {
        "swimg": [swimg, "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, target],
        "qemu-img": ["qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, target],
        "nbdcopy": ["nbdcopy", "--flush", source, target],
        "nbdcopy 4 x 2 x 128 KiB": [
            "nbdcopy", "--flush", "--connections=4", "--requests=2", "--request-size=131072", source, target],
        "nbdcopy 1 x 16 x 128 KiB": [
            "nbdcopy", "--flush", "--connections=1", "--requests=16", "--request-size=131072", source, target],
        "nbdcopy 2 x 8 x 256 KiB": [
            "nbdcopy", "--flush", "--connections=2", "--requests=8", source, target],
    }


def published(swimg, source, folder, pairs):
    """Measures with the target as the previous run left it, then with new servers for each run,
    then with a new target as well."""
    target = f"{folder}/target.qcow2"

    def create():
        if os.path.exists(target):
            os.unlink(target)
        run("qemu-img", "create", "-q", "-f", "qcow2", target, str(SIZE))

    names = list(programs(swimg, "", ""))
    with qemu_nbd(source, f"{folder}/one", "-r") as one:
        for name in names:
            create()
            with qemu_nbd(target, f"{folder}/first") as two:
                run(*programs(swimg, one, two)[name])
            run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", source, target)

        def again(rounds):
            with qemu_nbd(target, f"{folder}/again") as two:
                results = {name: [] for name in names}
                for number in range(3 + rounds):
                    for name in random.sample(names, len(names)):
                        times = peak_and_time(programs(swimg, one, two)[name])
                        if number >= 3:
                            results[name].append(times)
            run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", source, target)
            return results

        def anew(rounds, with_target):
            results = {name: [] for name in names}
            for _ in range(rounds):
                for name in random.sample(names, len(names)):
                    if with_target:
                        create()
                    with qemu_nbd(source, f"{folder}/own", "-r") as own, qemu_nbd(target, f"{folder}/new") as two:
                        results[name].append(peak_and_time(programs(swimg, own, two)[name]))
            return results

        for title, results in [
                ("as published", again(pairs)),
                ("servers started for each run", anew(pairs // 2, False)),
                ("and a new target", anew(pairs // 4, True))]:
            print(f"| 6 GiB, {title} | seconds | swimg is times as fast | MiB |\n|---|---|---|---|")
            for name, times in results.items():
                ratio = statistics.median(t / s for (t, _), (s, _) in zip(times, results["swimg"]))
                print(
                    f"| {name} | {statistics.median(t for t, _ in times):.2f} | {ratio:.2f} "
                    f"| {max(m for _, m in times) / 1024:.1f} |", flush=True)
            print()


def delayed(swimg, folder):
    """Measures with servers that only delay each request by 5 ms. Requests of 64 KiB make sure that
    the server is not the limit: 32 of them in flight are at most 0.4 GB/s. swimg also runs on one
    core."""
    print("| 5 ms a request | seconds | on one core | nbdcopy | requests / in flight x 5 ms "
          "| times as long | on one core |\n|---|---|---|---|---|---|---|")
    waits = 512
    expected = waits * 0.005
    cases = itertools.product([64, 256], ["read", "write"], [(1, 4), (4, 2), (4, 4), (4, 8)])
    for kib, way, (connections, requests) in cases:
        size = waits * connections * requests * kib << 10
        file = f"{folder}/full.raw"
        socket = f"{folder}/{way}{connections}x{requests}x{kib}"
        command = [
            "nbdkit", "-f", "-U", socket, "-t", "64", "--filter=noextents", "--filter=delay", "null",
            str(size), f"delay-{way}=5ms"]
        flags = [f"--connections={connections}", f"--requests={requests}", f"--request-size={kib << 10}"]
        if way == "write":
            run("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' '\\7' > {file}")
        with server(command, socket) as slow:
            ends = [slow, file] if way == "read" else [file, slow]
            own = [swimg, "convert", "-n" if way == "write" else "-W", "-f", "raw", "-O", "raw", *flags, *ends]
            peer = ["nbdcopy", *flags, slow, "null:"] if way == "read" else ["nbdcopy", *flags, file, slow]
            commands = [own, ["taskset", "-c", "0", *own], peer]
            seconds = [[] for _ in commands]
            for _ in range(3):
                for times, command in zip(seconds, commands):
                    times.append(peak_and_time(command)[0])
        middle, alone, other = [statistics.median(times) for times in seconds]
        print(f"| {way} {size >> 20} MiB, {connections} x {requests} x {kib} KiB | {middle:.2f} | {alone:.2f} "
              f"| {other:.2f} | {expected:.2f} | {middle / expected:.2f} | {alone / expected:.2f} |", flush=True)
        os.unlink(file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench", help="where the disk of bench.py is")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", choices=["published", "delayed"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        source = f"{folder}/source.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{options.folder}/disk.raw", source)
        run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", source, str(SIZE))
        if options.only != "delayed":
            published(os.path.realpath(options.swimg), source, folder, options.pairs)
        if options.only != "published":
            delayed(os.path.realpath(options.swimg), folder)


if __name__ == "__main__":
    main()
