#!/usr/bin/env python3
"""Times swimg against qemu-img in pairs and updates docs/BENCHMARKS.md and docs/benchmarks.svg.

Usage: bench.py path/to/swimg [--folder DIR] [--rounds N] [--only WORD]

Absolute times depend on the machine and its load; the ratio of two consecutive runs does not. So
the programs take turns, in random order in each round, and the result is the median of the ratios.
Sources are in the page cache; targets are new and are deleted once measured. Each case's result is
verified once with `qemu-img compare` and `qemu-img check`.

Cases that write gigabytes of new data need many pairs. On a virtual machine that returns free
memory to its host, writing a target of 3.4 GB takes any program 1 s or 5 s, depending on the memory
that the kernel hands out. If a target has just been deleted, its memory is probably still
available, and the random order makes this equal for all programs; touching memory beforehand did
not help.

Cases with a floor also time floor.c, which does the same work with the simplest calls.
"""

import argparse
import dataclasses
import datetime
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import chart
import datasets
import host_memory
from datasets import run

# A file system in memory. On a disk, 8 GiB of new data in the page cache would wait for the disk.
MEMORY = "/dev/shm"
FAST = ["-m", "8", "-W"]
ZSTD = ["-c", "-o", "compression_type=zstd"]
FLUSHED = FAST + ["-t", "writeback"]


@dataclasses.dataclass
class Case:
    name: str
    source: str
    source_format: str
    target_format: str
    options: list = dataclasses.field(default_factory=lambda: FAST)
    # None uses `options`.
    peer_options: list | None = None
    # The mode of floor.c, if the case has a floor.
    floor: str | None = None
    # The maximum number of rounds; None uses --rounds.
    rounds: int | None = None
    # The ratio that the issue and the README promise.
    goal: float = 1.0
    file_system: str | None = None
    # The folder of the targets, if not that of the sources.
    place: str | None = None
    # Whether the case is short, so that --rounds does not apply.
    is_short: bool = False
    # Whether the case takes milliseconds and little memory: --rounds does not apply, and the source
    # is not read into the page cache.
    is_small: bool = False


CASES = [
    Case("qcow2 to raw", "disk.qcow2", "qcow2", "raw", floor="copy"),
    Case("raw to raw", "disk.raw", "raw", "raw", floor="copy"),
    Case("raw to qcow2", "disk.raw", "raw", "qcow2", floor="copy", goal=1.3),
    Case("qcow2 to qcow2", "disk.qcow2", "qcow2", "qcow2", floor="copy", goal=1.3),
    Case("qcow2 to raw, -t writeback", "disk.qcow2", "qcow2", "raw", FLUSHED),
    Case("raw to qcow2, -t writeback", "disk.raw", "raw", "qcow2", FLUSHED, goal=1.3),
    Case("zlib qcow2 to raw", "zlib.qcow2", "qcow2", "raw", floor="zlib", goal=2.5),
    Case("zstd qcow2 to raw", "zstd.qcow2", "qcow2", "raw", floor="zstd", goal=2.0),
    Case("raw to zlib qcow2", "disk.raw", "raw", "qcow2", FAST + ["-c"], rounds=1),
    Case("raw to zstd qcow2", "disk.raw", "raw", "qcow2", FAST + ZSTD, rounds=2),
    Case("part to zlib in order, against -c", "part.raw", "raw", "qcow2", ["-c"], floor="pack-zlib", rounds=2,
         goal=2.2),
    Case("part to zlib in order, against -c -W", "part.raw", "raw", "qcow2", ["-c"], FAST + ["-c"],
         rounds=3, goal=1.15),
    Case("part to zlib level 1, against -c -W", "part.raw", "raw", "qcow2",
         FAST + ["-c", "-o", "compression_level=1"], FAST + ["-c"], rounds=2, goal=5),
    Case("part to zstd in order, against -c", "part.raw", "raw", "qcow2", ZSTD, floor="pack-zstd", rounds=5,
         goal=2.5),
    Case("part to zstd in order, against -c -W", "part.raw", "raw", "qcow2", ZSTD, FAST + ZSTD,
         rounds=5, goal=1.3),
    Case("131072 scattered clusters to raw", "scattered.qcow2", "qcow2", "raw", floor="plain", rounds=3, goal=1.5),
    Case("131072 scattered clusters to qcow2", "scattered.qcow2", "qcow2", "qcow2", floor="plain", rounds=3,
         goal=1.5),
    Case("131072 scattered clusters to raw, in memory", "scattered.qcow2", "qcow2", "raw", floor="plain", rounds=3,
         goal=1.5, place=MEMORY),
    Case("131072 scattered clusters to qcow2, in memory", "scattered.qcow2", "qcow2", "qcow2", floor="plain",
         rounds=3, goal=1.5, place=MEMORY),
    Case("4 GiB of zeros to qcow2", "zeros.raw", "raw", "qcow2", floor="scan", rounds=25, goal=1.5, is_short=True),
    Case("1 TiB of metadata to raw", "metadata.qcow2", "qcow2", "raw", rounds=11, goal=2, is_small=True),
    Case("1 TiB of metadata to qcow2", "metadata.qcow2", "qcow2", "qcow2", rounds=11, goal=2, is_small=True),
    Case("8 TiB of nothing to raw", "empty.qcow2", "qcow2", "raw", rounds=51, goal=2, is_small=True),
    Case("8 TiB of nothing to qcow2", "empty.qcow2", "qcow2", "qcow2", rounds=51, goal=2, is_small=True),
    Case("1 MiB, raw to qcow2", "tiny.raw", "raw", "qcow2", rounds=201, goal=1.5, is_small=True),
] + [
    case
    for system in ["xfs", "btrfs"]
    for case in [
        Case(f"{system}: raw to raw, against -C", "disk.raw", "raw", "raw", FAST, ["-m", "8", "-C"],
             rounds=5, file_system=system),
        Case(f"{system}: qcow2 to raw, against -C", "disk.qcow2", "qcow2", "raw", FAST,
             ["-m", "8", "-C"], rounds=5, file_system=system),
        Case(f"{system}: raw to qcow2", "disk.raw", "raw", "qcow2", rounds=3, goal=2,
             file_system=system),
        Case(f"{system}: qcow2 to qcow2", "disk.qcow2", "qcow2", "qcow2", rounds=3, goal=2,
             file_system=system),
    ]
]


@dataclasses.dataclass
class Question:
    """A verb that reads images and prints an answer. swimg and qemu-img get the same words."""
    name: str
    words: list
    images: list
    rounds: int
    goal: float = 1.5
    is_small: bool = False
    # Whether the answers must be identical.
    is_literal: bool = True


QUESTIONS = [
    Question("compare, disk", ["compare", "-f", "qcow2", "-F", "raw"], ["disk.qcow2", "disk.raw"], 7),
    Question("compare, scattered", ["compare"], ["scattered.qcow2", "scattered.qcow2"], 5),
    Question("check, disk", ["check"], ["disk.qcow2"], 51, is_small=True),
    Question("check, scattered", ["check"], ["scattered.qcow2"], 51, is_small=True),
    Question("map, disk", ["map", "--output=json"], ["disk.qcow2"], 51, is_small=True),
    Question("map, scattered", ["map", "--output=json"], ["scattered.qcow2"], 51, is_small=True),
    # swimg shows `children`, as QEMU has since version 8.
    Question("info, disk", ["info", "--output=json"], ["disk.qcow2"], 301, goal=1.0, is_small=True, is_literal=False),
]


@dataclasses.dataclass
class Change:
    """A verb that changes an image. `{image}` is a file of each program's own, `{folder}` that of
    the datasets."""
    name: str
    words: str
    # Commands of qemu-img, before the image is read into the page cache: once, and before each run.
    once: list = dataclasses.field(default_factory=list)
    before: list = dataclasses.field(default_factory=list)
    # What qemu-img says of the result must be nothing bad.
    judge: list = dataclasses.field(default_factory=list)
    rounds: int = 5
    goal: float = 1.5


SECRET = "--object secret,id=s,data=benchmark"
LUKS = f"{SECRET} -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
UNLOCKED = "driver=qcow2,encrypt.key-secret=s,file.filename={image}"
CHANGES = [
    Change("-n, into an image with the same clusters", "convert -n -m 8 -W -f raw -O qcow2 {folder}/disk.raw {image}",
           once=["convert -m 8 -W -O qcow2 {folder}/disk.qcow2 {image}"],
           judge=["compare {folder}/disk.raw {image}", "check {image}"]),
    Change("-n, into an empty image", "convert -n -m 8 -W -f raw -O qcow2 {folder}/disk.raw {image}",
           before=["create -q -f qcow2 {image} 8G"],
           judge=["compare {folder}/disk.raw {image}", "check {image}"]),
    Change("commit into an empty base", "commit -q -d {image}",
           once=["convert -m 8 -W -O qcow2 {folder}/disk.qcow2 {image}",
                 "rebase -u -b {image}.base -F qcow2 {image}"],
           before=["create -q -f qcow2 {image}.base 8G"],
           judge=["compare {folder}/disk.raw {image}.base", "check {image}.base"]),
    Change("rebase onto an empty base", "rebase -b {image}.base -F qcow2 {image}",
           once=["create -q -f qcow2 {image}.base 8G"],
           before=["create -q -f qcow2 -b {folder}/disk.qcow2 -F qcow2 {image}"],
           judge=["compare {folder}/disk.raw {image}", "check {image}"]),
    Change("snapshot -d", "snapshot -d s {image}",
           once=["convert -m 8 -W -O qcow2 {folder}/disk.qcow2 {image}"],
           before=["snapshot -c s {image}"], judge=["compare {folder}/disk.raw {image}", "check {image}"]),
    Change("raw to LUKS qcow2", f"convert -m 8 -W -f raw -O qcow2 {LUKS} {{folder}}/disk.raw {{image}}",
           judge=[f"compare {SECRET} --image-opts driver=raw,file.filename={{folder}}/disk.raw {UNLOCKED}"], goal=2),
    Change("LUKS qcow2 to raw",
           f"convert -m 8 -W -O raw {SECRET} --image-opts {UNLOCKED} {{image}}.raw",
           once=[f"convert -m 8 -W -f raw -O qcow2 {LUKS} {{folder}}/disk.raw {{image}}"],
           judge=["compare -f raw -F raw {folder}/disk.raw {image}.raw"], goal=2),
]


def change(case, swimg, folder, rounds):
    programs = [swimg, "qemu-img"]
    images = [f"{folder}/changed.{name}" for name in ["swimg", "qemu"]]

    def words(text, image):
        return [word.format(folder=folder, image=image) for word in text.split()]

    rounds = min(rounds, case.rounds)
    times, peaks = [[], []], [[], []]
    try:
        for image in images:
            for line in case.once:
                run("qemu-img", *words(line, image))
        for number in range(rounds):
            for turn in random.sample(range(2), 2):
                image = images[turn]
                for line in case.before:
                    run("qemu-img", *words(line, image))
                for source in ["disk.raw", "disk.qcow2"]:
                    if f"{{folder}}/{source}" in case.words + " ".join(case.before):
                        warm(f"{folder}/{source}")
                if os.path.exists(image):
                    warm(image)
                seconds, peak = measure([programs[turn], *words(case.words, image)], False)
                times[turn].append(seconds)
                peaks[turn].append(peak)
                if turn == 0 and number == 0:
                    for line in case.judge:
                        run("qemu-img", *words(line, image))
    finally:
        for image in images:
            for path in [image, f"{image}.base", f"{image}.raw"]:
                if os.path.exists(path):
                    os.unlink(path)
    return Result(Case(case.name, "", "", "", goal=case.goal), rounds, times, peaks, 1)


def warm(path):
    """Reads a file into the page cache, which usually holds most pages already."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def measure(command, is_small):
    """The time in seconds and the peak memory in KiB of one run."""
    with tempfile.NamedTemporaryFile() as report:
        if is_small:
            # GNU time would take a large part of the measured time.
            start = time.monotonic()
            run(*command)
            seconds = time.monotonic() - start
            run("/usr/bin/time", "-o", report.name, "-f", "%M", *command)
            return seconds, int(report.read())
        # GNU time itself is small; a process forked from Python would start with Python's peak
        # memory.
        start = time.monotonic()
        run("/usr/bin/time", "-o", report.name, "-f", "%M", *command)
        seconds = time.monotonic() - start
        return seconds, int(report.read())


def judge(case, source, target):
    formats = ["-f", case.source_format, "-F", case.target_format]
    run("qemu-img", "compare", *formats, source, target)
    if case.target_format != "raw":
        run("qemu-img", "check", "-f", case.target_format, target)


def taken(path):
    return os.stat(path).st_blocks * 512


@dataclasses.dataclass
class Result:
    case: Case
    rounds: int
    times: list
    peaks: list
    space: float

    def ratio(self, other, one=0):
        return statistics.median(b / a for a, b in zip(self.times[one], self.times[other]))

    def row(self):
        floor = f"{self.ratio(0, 2):.2f}" if len(self.times) > 2 else ""
        seconds = [statistics.median(times) for times in self.times]
        unit = (lambda s: f"{1000 * s:.1f} ms") if self.case.is_small else (lambda s: f"{s:.2f} s")
        return (
            f"| {self.case.name} | {self.rounds} | {unit(seconds[0])} | {unit(seconds[1])} "
            f"| {self.ratio(1):.2f} | {self.case.goal:g} | {floor} | {max(self.peaks[0]) / 1024:.1f} "
            f"| {max(self.peaks[1]) / 1024:.1f} | {self.space:.3f} |")


HEAD = (
    "| case | pairs | swimg | qemu-img | times as fast | goal | times the floor | MiB swimg "
    "| MiB qemu-img | space |\n|---|---|---|---|---|---|---|---|---|---|")


def bench(case, swimg, folder, floor, rounds):
    if case.is_small or case.is_short:
        rounds = case.rounds
    else:
        rounds = min(case.rounds or rounds, rounds)
    place = case.place or folder
    source = f"{folder}/{case.source}"
    if case.file_system:
        place = f"{folder}/{case.file_system}.mount"
        if not os.path.exists(f"{place}/{case.source}"):
            run("cp", "--sparse=always", source, f"{place}/{case.source}")
            # The program that shares dirty blocks first would have to write them out.
            os.sync()
        source = f"{place}/{case.source}"
    line = ["convert", "-f", case.source_format, "-O", case.target_format]
    targets = [f"{place}/out.{name}" for name in ["swimg", "qemu", "floor"]]
    peer_options = case.options if case.peer_options is None else case.peer_options
    commands = [
        [swimg, *line, *case.options, source, targets[0]],
        ["qemu-img", *line, *peer_options, source, targets[1]],
    ]
    if case.floor:
        words = [case.floor, source, targets[2]]
        if case.floor in ["zlib", "zstd", "plain"]:
            datasets.compressed_clusters(source, f"{folder}/clusters")
            words.append(f"{folder}/clusters")
        commands.append([floor, *words])
    times, peaks, space = [[] for _ in commands], [[] for _ in commands], [0 for _ in commands]
    for number in range(rounds):
        for turn in random.sample(range(len(commands)), len(commands)):
            if not case.is_small:
                warm(source)
            seconds, peak = measure(commands[turn], case.is_small)
            times[turn].append(seconds)
            peaks[turn].append(peak)
            space[turn] = taken(targets[turn])
            if turn == 0 and number == 0:
                judge(case, source, targets[0])
            os.unlink(targets[turn])
    return Result(case, rounds, times, peaks, space[0] / max(space[1], 1))


def ask(question, swimg, folder):
    images = [f"{folder}/{image}" for image in question.images]
    commands = [[program, *question.words, *images] for program in [swimg, "qemu-img"]]
    answers = [subprocess.run(command, capture_output=True, check=True).stdout for command in commands]
    if question.is_literal and answers[0] != answers[1]:
        raise SystemExit(f"{question.name}: the answers differ")
    times, peaks = [[], []], [[], []]
    for number in range(question.rounds):
        for turn in random.sample(range(2), 2):
            for image in {} if question.is_small else set(images):
                warm(image)
            seconds, peak = measure(commands[turn], question.is_small)
            times[turn].append(seconds)
            peaks[turn].append(peak)
    case = Case(question.name, "", "", "", goal=question.goal, is_small=question.is_small)
    return Result(case, question.rounds, times, peaks, 1)


def version(program):
    return subprocess.run(
        [program, "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]


def bench_start(swimg):
    """Times `--version`, which needs only the start of Swift's runtime."""
    case = Case("--version", "", "", "", is_small=True, goal=1.5)
    times, peaks = [[], []], [[], []]
    for number in range(301):
        for index, program in [(0, swimg), (1, "qemu-img")][:: 1 if number % 2 else -1]:
            seconds, peak = measure([program, "--version"], True)
            times[index].append(seconds)
            peaks[index].append(peak)
    return Result(case, 301, times, peaks, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("swimg")
    parser.add_argument("--folder", default="/var/tmp/swimg-bench")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of a case's name, or several with |")
    options = parser.parse_args()
    swimg = os.path.realpath(options.swimg)
    folder = options.folder
    os.makedirs(folder, exist_ok=True)
    datasets.prepare(folder)
    floor = f"{folder}/floor"
    here = os.path.dirname(os.path.realpath(__file__))
    run("clang", "-O2", "-o", floor, f"{here}/floor.c", "-lpthread", "-ldeflate", "-lz", "-lzstd")

    results = []
    print(HEAD, flush=True)

    def note(result):
        results.append(result)
        print(result.row(), flush=True)

    words = options.only.split("|")
    chosen = [case for case in CASES if any(word in case.name for word in words)]
    with host_memory.kept():
        for case in chosen:
            if not case.file_system:
                note(bench(case, swimg, folder, floor, options.rounds))
        if any(word in "--version" for word in words):
            note(bench_start(swimg))
        for question in QUESTIONS:
            if any(word in question.name for word in words):
                note(ask(question, swimg, folder))
        for case in CHANGES:
            if any(word in case.name for word in words):
                note(change(case, swimg, folder, options.rounds))
        for system in ["xfs", "btrfs"]:
            cases = [case for case in chosen if case.file_system == system]
            if cases and os.geteuid() == 0:
                with datasets.mounted(system, folder, 20 << 30):
                    for case in cases:
                        note(bench(case, swimg, folder, floor, options.rounds))

    if not options.only:
        docs = f"{os.path.dirname(here)}/docs"
        with open(f"{docs}/BENCHMARKS.md") as file:
            before, _, rest = file.read().partition("<!-- make bench -->\n")
            _, _, behind = rest.partition("<!-- end -->")
        with open(f"{docs}/BENCHMARKS.md", "w") as file:
            file.write(
                f"{before}<!-- make bench -->\nWritten by `make bench` on {datetime.date.today()}: "
                f"{chart.machine()}, {version('qemu-img')}. Medians; a ratio is that of the two runs "
                "of a pair. \"Times the floor\": our time divided by that of the plainest program that does "
                "the same work (Benchmarks/floor.c).\n\n![ratios](benchmarks.svg)\n\n"
                + "\n".join([HEAD] + [result.row() for result in results]) + f"\n<!-- end -->{behind}")
        bars = [(result.case.name, result.ratio(1), result.case.goal) for result in results]
        with open(f"{docs}/benchmarks.svg", "w") as file:
            file.write(chart.svg(bars))


if __name__ == "__main__":
    main()
