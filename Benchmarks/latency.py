#!/usr/bin/env python3
"""Times swimg on storage with latency and with limited bandwidth against qemu-img and nbdcopy.

Usage: latency.py path/to/swimg [--folder DIR] [--rounds N] [--only WORDS]

Files: latency.c is preloaded into both programs and sleeps before each data system call of 4 KiB or
more. NBD: nbdkit serves from memory with its filter `delay`, or `rate` for bandwidth. The disk has
384 MiB of data. The programs take turns in random order, and each result is compared once. The
peers are qemu-img -m 8 -W and -m 16 -W, nbdcopy -C 4 -R 8 and -C 4 -R 64; the one whose median is
the best counts. A ratio above 1 is the factor by which swimg is faster.

The ideal is the time that waiting takes if 64 MiB are always in flight, and the time of floor.c for
the same bytes without any waiting, measured in the same rounds.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import tempfile
import time

import host_memory

SIZE = 384 << 20
# The buffers of swimg, unless it is told otherwise.
IN_FLIGHT = 64 << 20
MILLISECONDS = [0, 0.1, 1, 5, 20]


def run(command, environment=None):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def timed(command, environment):
    start = time.monotonic()
    run(command, environment)
    return time.monotonic() - start


class File:
    """A conversion from file to file."""

    @property
    def waiting(self):
        """Seconds that all bytes wait if as many as can be are in flight; None if nobody knows."""
        if self.source not in ["disk.raw", "disk.qcow2"] or self.options:
            return None
        return (self.read + self.write) / 1000 * SIZE / IN_FLIGHT

    def __init__(self, name, source, source_format, options, read, write, target_format="raw", defaults=None):
        self.name = f"{name}, {read:g} ms reads, {write:g} ms writes"
        self.source, self.source_format, self.options = source, source_format, options
        self.target_format, self.defaults = target_format, defaults
        self.read, self.write = read, write

    @contextlib.contextmanager
    def setup(self, bench):
        bench.environment = dict(
            os.environ, LD_PRELOAD=bench.library, SLEEP_READ=str(int(self.read * 1000)),
            SLEEP_WRITE=str(int(self.write * 1000)))
        yield

    def commands(self, bench):
        source = bench.path(self.source)
        common = ["-f", self.source_format, "-O", self.target_format, *self.options]
        ours = {"swimg": [bench.swimg, "convert", *common, *(self.defaults or []), source, bench.path("ours")]}
        return ours | {
            f"qemu-img -m {count}": ["qemu-img", "convert", "-m", str(count), "-W", *common, source, bench.path("theirs")]
            for count in [8, 16]}

    def before(self, bench):
        for name in ["ours", "theirs"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(bench.path(name))

    def check(self, bench):
        for name in ["ours", "theirs"]:
            run(["qemu-img", "compare", "-f", self.source_format, "-F", self.target_format,
                 bench.path(self.source), bench.path(name)])


class Places(File):
    """A copy between two existing places."""

    def __init__(self, kind, milliseconds):
        super().__init__(f"raw to raw, {kind}", "disk.raw", "raw", [], milliseconds, milliseconds)

    def commands(self, bench):
        common = ["-n", "-f", "raw", "-O", "raw"]
        ours = {"swimg": [bench.swimg, "convert", *common, *self.places]}
        return ours | {
            f"qemu-img -m {count}": ["qemu-img", "convert", "-m", str(count), "-W", *common, *self.places]
            for count in [8, 16]}

    def before(self, bench):
        pass

    def check(self, bench):
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", bench.path("disk.raw"), self.places[1]])


class Devices(Places):
    """A copy between loop devices."""

    waiting = None

    def __init__(self, milliseconds):
        super().__init__("devices", milliseconds)

    @contextlib.contextmanager
    def setup(self, bench):
        with super().setup(bench), contextlib.ExitStack() as stack:
            run(["truncate", "-s", str(SIZE), bench.path("target")])
            self.places = []
            for name in ["disk.raw", "target"]:
                command = ["losetup", "-f", "--show", bench.path(name)]
                device = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
                stack.callback(run, ["losetup", "-d", device])
                self.places.append(device)
            yield


class Zeros(File):
    """A conversion of 16 GiB of zeros into an existing file, with a slow `fallocate`."""

    waiting = None

    def __init__(self, milliseconds):
        super().__init__("16 GiB of zeros to raw", "zeros.raw", "raw", ["-n"], 0, 0)
        self.name = f"16 GiB of zeros into a file, {milliseconds:g} ms each fallocate"
        self.milliseconds = milliseconds

    @contextlib.contextmanager
    def setup(self, bench):
        run(["truncate", "-s", "16G", bench.path("zeros.raw")])
        with super().setup(bench):
            bench.environment["SLEEP_ZERO"] = str(int(self.milliseconds * 1000))
            yield

    def before(self, bench):
        for name in ["ours", "theirs"]:
            with open(bench.path(name), "wb") as file:
                file.truncate(16 << 30)
                file.write(b"swimg")


class NBD:
    """A copy between two servers in memory."""

    waiting = None

    def __init__(self, kind, milliseconds=None, rate=None):
        self.kind, self.milliseconds, self.rate = kind, milliseconds, rate
        what = f"{milliseconds:g} ms" if milliseconds is not None else f"{rate} bit/s"
        self.name = f"NBD to NBD, {kind}, {what}"

    @contextlib.contextmanager
    def setup(self, bench):
        bench.environment = dict(os.environ)
        with contextlib.ExitStack() as stack:
            self.names = []
            for number, data in enumerate([["file", bench.path("disk.raw")], ["memory", str(SIZE)]]):
                filters = []
                if self.milliseconds:
                    filters = ["--filter=delay"]
                    data = data + [f"rdelay={self.milliseconds:g}ms", f"wdelay={self.milliseconds:g}ms"]
                if self.rate:
                    filters = ["--filter=rate"]
                    data = data + [f"rate={self.rate}"]
                if self.kind == "unix":
                    socket = bench.path(f"socket{number}")
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(socket)
                    place, name = ["-U", socket], f"nbd+unix:///?socket={socket}"
                else:
                    port = random.randint(20000, 30000)
                    place, name = ["-i", "localhost", "-p", str(port)], f"nbd://localhost:{port}"
                process = subprocess.Popen(["nbdkit", "-f", "-t", "64", *place, *filters, *data])
                stack.callback(process.wait)
                stack.callback(process.terminate)
                self.names.append(name)
            time.sleep(0.3)
            yield

    def commands(self, bench):
        source, target = self.names
        common = ["-n", "-f", "raw", "-O", "raw", source, target]
        return {
            "swimg": [bench.swimg, "convert", *common],
            "qemu-img -m 8": ["qemu-img", "convert", "-m", "8", "-W", *common],
            "qemu-img -m 16": ["qemu-img", "convert", "-m", "16", "-W", *common],
            "nbdcopy -R 8": ["nbdcopy", "-C", "4", "-R", "8", source, target],
            "nbdcopy -R 64": ["nbdcopy", "-C", "4", "-R", "64", source, target],
        }

    def before(self, bench):
        # The rate filter allows a burst that takes it two seconds to accumulate.
        if self.rate:
            time.sleep(2.5)

    def check(self, bench):
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", bench.path("disk.raw"), self.names[1]])


def cases():
    for read, write in [(time, time) for time in MILLISECONDS] + [(5, 0), (0, 5)]:
        yield File("qcow2 to raw, -m 8 -W", "disk.qcow2", "qcow2", [], read, write, defaults=["-m", "8", "-W"])
    for read, write in [(0, 0), (1, 1), (5, 5), (20, 20)]:
        yield File("qcow2 to raw", "disk.qcow2", "qcow2", [], read, write)
    for time in [0, 1, 5, 20]:
        yield File("raw to raw", "disk.raw", "raw", [], time, time)
        yield File("raw to qcow2", "disk.raw", "raw", [], time, time, "qcow2")
    for time in [0, 5]:
        yield File("zlib qcow2 to raw", "zlib.qcow2", "qcow2", [], time, time)
        yield File("zstd qcow2 to raw", "zstd.qcow2", "qcow2", [], time, time)
        yield File("raw to raw, -t none -W", "disk.raw", "raw", ["-t", "none"], time, time, defaults=["-W"])
    for time in [0, 5, 20] if os.geteuid() == 0 else []:
        yield Devices(time)
    yield Zeros(20)
    for kind in ["unix", "tcp"]:
        for time in [0, 1, 10, 50]:
            yield NBD(kind, milliseconds=time)
    for rate in ["4000M", "1000M"]:
        yield NBD("unix", rate=rate)


class Bench:
    def __init__(self, swimg, folder):
        self.swimg, self.folder = swimg, folder
        self.library = self.path("latency.so")
        place = os.path.dirname(os.path.abspath(__file__))
        run(["cc", "-O2", "-shared", "-fPIC", "-o", self.library, f"{place}/latency.c", "-ldl"])
        self.floor = self.path("floor")
        run(["cc", "-O2", "-pthread", "-o", self.floor, f"{place}/floor.c", "-ldeflate", "-lz", "-lzstd"])
        random.seed(1)
        with open(self.path("disk.raw"), "wb") as file:
            for _ in range(SIZE >> 20):
                # Half of the disk is compressible.
                file.write(random.randbytes(512 << 10) + b"swimg" * 104857 + b"123")
        for name, options in [("disk", []), ("zlib", ["-c"]), ("zstd", ["-c", "-o", "compression_type=zstd"])]:
            run(["qemu-img", "convert", "-O", "qcow2", *options, self.path("disk.raw"), self.path(f"{name}.qcow2")])

    def path(self, name):
        return os.path.join(self.folder, name)

    def measure(self, case, rounds):
        """The medians of swimg's time, of the best peer's, of the ratio in each round, and the ideal."""
        with case.setup(self):
            commands = case.commands(self)
            if case.waiting is not None:
                commands["floor"] = [self.floor, "copy", self.path("disk.raw"), self.path("floor.raw")]
            times = {name: [] for name in commands}
            for number in range(rounds):
                names = list(commands)
                random.shuffle(names)
                for name in names:
                    case.before(self)
                    times[name].append(timed(commands[name], None if name == "floor" else self.environment))
                    if number == 0 and isinstance(case, NBD):
                        case.check(self)
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path("floor.raw"))
                if number == 0 and isinstance(case, File):
                    case.before(self)
                    for name in names:
                        run(commands[name])
                    case.check(self)
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = min(set(medians) - {"swimg", "floor"}, key=medians.get)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times["swimg"], times[best]))
        ideal = None if case.waiting is None else case.waiting + medians["floor"]
        return medians["swimg"], best, medians[best], ratio, ideal


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("swimg")
    parser.add_argument("--folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    with host_memory.kept(), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(os.path.abspath(arguments.swimg), folder)
        print("| work | swimg | best peer | its time | ratio | ideal |\n|---|---|---|---|---|---|", flush=True)
        for case in cases():
            if arguments.only in case.name:
                ours, peer, best, ratio, ideal = bench.measure(case, arguments.rounds)
                shown = f"{ideal:.2f} s" if ideal is not None else ""
                print(f"| {case.name} | {ours:.2f} s | {peer} | {best:.2f} s | {ratio:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
