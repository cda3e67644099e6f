#!/usr/bin/env python3
"""Times swimg against qemu-img and nbdcopy between two servers on unix sockets.

Usage: nbd.py path/to/swimg [--folder DIR] [--pairs N]

The scenario that nbdcopy was published with: two qemu-nbd in memory (/dev/shm), a disk of 6 GiB, about a third of it
data. The programs take turns, in random order in each round. The target is emptied before each turn,
and compared once for each program. Then the same with 5 ms for each request: there nothing counts but how
many are in flight.
"""

import argparse
import contextlib
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


def qemu_nbd(file, socket):
    return server(["qemu-nbd", "-t", "-e", "16", "-f", "raw", "--discard=unmap", "-k", socket, file], socket)


def peak_and_time(command):
    with tempfile.NamedTemporaryFile() as report:
        start = time.monotonic()
        run("/usr/bin/time", "-o", report.name, "-f", "%M", *command)
        return time.monotonic() - start, int(report.read())


def published(swimg, source, folder, pairs):
    target = f"{folder}/target.raw"
    with open(target, "wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(source, f"{folder}/one") as one, qemu_nbd(target, f"{folder}/two") as two:
        commands = {
            "swimg": [swimg, "convert", "-n", "-W", "-f", "raw", "-O", "raw", one, two],
            "qemu-img": ["qemu-img", "convert", "-n", "-m", "8", "-W", "-f", "raw", "-O", "raw", one, two],
            "nbdcopy": ["nbdcopy", one, two],
            "nbdcopy 4 x 2 x 128 KiB": [
                "nbdcopy", "--connections=4", "--requests=2", "--request-size=131072", one, two],
        }
        results = {name: [] for name in commands}
        for number in range(pairs):
            for name in random.sample(list(commands), len(commands)):
                # The server keeps it open: the same file, without its data.
                os.truncate(target, 0)
                os.truncate(target, SIZE)
                results[name].append(peak_and_time(commands[name]))
                if number == 0:
                    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, target)
    print("| two qemu-nbd in memory, 6 GiB | seconds | swimg is times as fast | MiB |\n|---|---|---|---|")
    for name, times in results.items():
        ratio = statistics.median(t / s for (t, _), (s, _) in zip(times, results["swimg"]))
        print(
            f"| {name} | {statistics.median(t for t, _ in times):.2f} | {ratio:.2f} "
            f"| {max(m for _, m in times) / 1024:.1f} |", flush=True)


def delayed(swimg, folder):
    """Nothing but waiting: a server that has nothing to do but to let 5 ms pass. It must not be the limit."""
    print("\n| 1 GiB, 5 ms a request | seconds | nbdcopy | requests / in flight x 5 ms | times as long |\n"
          "|---|---|---|---|---|")
    source = f"{folder}/full.raw"
    with open(source, "wb") as file:
        for _ in range(1024):
            file.write(bytes([7]) * (1 << 20))
    for way, size in [("read", 1024), ("write", 1024)]:
        for connections, requests in [(1, 4), (4, 2), (4, 4), (4, 8)]:
            socket = f"{folder}/{way}{connections}x{requests}"
            command = [
                "nbdkit", "-f", "-U", socket, "-t", "64", "--filter=noextents", "--filter=delay", "null",
                f"{size}M", f"delay-{way}=5ms"]
            flags = [f"--connections={connections}", f"--requests={requests}"]
            with server(command, socket) as slow:
                ends = [slow, f"{folder}/out.raw"] if way == "read" else [source, slow]
                peer = [slow, "null:"] if way == "read" else [source, slow]
                own = [swimg, "convert", "-n" if way == "write" else "-W", "-f", "raw", "-O", "raw"]
                commands = [own + flags + ends, ["nbdcopy", "--request-size=262144"] + flags + peer]
                seconds = [[], []]
                for _ in range(3):
                    for times, command in zip(seconds, commands):
                        times.append(peak_and_time(command)[0])
            middle, other = [statistics.median(times) for times in seconds]
            expected = size * 4 / (connections * requests) * 0.005
            print(f"| {way} {size} MiB, {connections} x {requests} | {middle:.2f} | {other:.2f} "
                  f"| {expected:.2f} | {middle / expected:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench", help="where the disk of bench.py is")
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        source = f"{folder}/source.raw"
        run("cp", "--sparse=always", f"{options.folder}/disk.raw", source)
        os.truncate(source, SIZE)
        published(os.path.realpath(options.swimg), source, folder, options.pairs)
        delayed(os.path.realpath(options.swimg), folder)


if __name__ == "__main__":
    main()
