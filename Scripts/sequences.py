#!/usr/bin/env python3
"""Runs random sequences of verbs on one image, by swimg and qemu-img in turns, and after each has
qemu-img compare the image with a model of its disk, its snapshots and its bitmaps.

Usage: sequences.py path/to/swimg [--seed N] [--count 2000] [--jobs 2] [--keep]

Sequence number i of seed N is the one of `--seed N+i --count 1`. A failure shows the commands that
lead to it, to be run in an empty folder. The exit code is 1 if there was one.

A command that swimg refuses and qemu-img carries out on a copy of the files, or the other way
round, is a failure as well, unless docs/differences.md names it (KNOWN).
"""

import argparse
import collections
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from sequence_conversions import Conversions
from sequence_images import PATTERN, PATTERN_COMMAND, Writes, new_image
from sequence_model import Bitmap, Finding, Judge, data_extents
from sequence_operations import Operation, Operations

# Rows of docs/differences.md, each with what the program says that refuses.
KNOWN = {
    "swimg": [
        ("not supported yet", r"not supported yet"),
        ("images that were not closed cleanly", r"not closed cleanly"),
        ("amend -o compat=0.10 with zstd or bitmaps", r"Cannot downgrade an image with"),
        ("preallocation while an encrypted image grows", r"not supported for encrypted images"),
    ],
    "qemu-img": [
        ("rebase of a described image to a relative name", r"Cannot use relative backing file"),
        ("resize --preallocation of a version 2 image over a longer backing file",
         r"Failed to zero out new clusters"),
        ("resize --preallocation into free space within the file",
         r"Cannot use preallocation for shrinking files"),
    ],
}
# What both programs say on stderr without failing.
EXPECTED = r"Skipping inconsistent bitmap|Leaked cluster|Repairing|Rebuilding"
# qemu-img and qemu-io cannot make a LUKS header while the machine is busy.
BUSY = "accurate CPU usage"


class Outcome:
    def __init__(self, folder, status, stdout, stderr):
        self.folder, self.status, self.stdout, self.stderr = folder, status, stdout, stderr

    def place(self, name):
        return os.path.join(self.folder, name)


def execute(program, words, folder):
    """Runs a program.

    - words: the command line, whose first word stands for the program.
    """
    for _ in range(20):
        done = subprocess.run([program, *words[1:]], cwd=folder, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=120)
        stdout, stderr = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        if BUSY not in stderr:
            break
    return Outcome(folder, done.returncode, stdout, stderr)


def copy_files(source, target):
    """Copies all files of a folder with their holes."""
    shutil.rmtree(target, ignore_errors=True)
    os.mkdir(target)
    for name in os.listdir(source):
        with (open(os.path.join(source, name), "rb", buffering=0) as old,
              open(os.path.join(target, name), "wb", buffering=0) as new):
            size = os.fstat(old.fileno()).st_size
            new.truncate(size)
            for start, end in data_extents(old.fileno(), size):
                os.pwrite(new.fileno(), os.pread(old.fileno(), end - start, start), start)


class Sequence:
    """One random image with all that happens to it."""

    def __init__(self, program, seed, folder):
        self.program, self.seed = program, seed
        self.random = random.Random(seed)
        self.folder, self.twin = os.path.join(folder, "own"), os.path.join(folder, "twin")
        os.mkdir(self.folder)
        self.log, self.images = [PATTERN_COMMAND], {}
        self.counts = collections.Counter()
        self.judge = Judge(lambda *words, **may: self._read(self.folder, *words, **may))
        self.twin_judge = Judge(lambda *words, **may: self._read(self.twin, *words, **may))
        self.operations = Operations(self)
        with open(self.place("pattern"), "wb") as file:
            file.write(PATTERN)

    def place(self, name):
        return os.path.join(self.folder, name)

    @staticmethod
    def _read(folder, words, may_fail=False):
        outcome = execute(words[0], words, folder)
        if outcome.status != 0 and not may_fail:
            raise Finding(f"{shlex.join(words)}: {outcome.stdout}{outcome.stderr}")
        return outcome

    def run(self, words):
        """Runs a command that changes an image; swimg and qemu's programs go by their names."""
        self.log.append(shlex.join(words))
        program = self.program if words[0] == "swimg" else words[0]
        outcome = execute(program, words, self.folder)
        if outcome.status != 0:
            said = (outcome.stderr or outcome.stdout).strip().splitlines()
            self.log[-1] += f"   # {outcome.status}: {said[0] if said else ''}"
        return outcome

    # The sequence

    def play(self):
        """Raises a Finding if something goes wrong."""
        count = self.random.choice([0, 0, 1, 1, 2])
        base = None
        for number in range(count):
            base = self.new_base(f"start{number}", number == 0, base)
        while True:
            image, words = new_image(self.random, "disk", base)
            if self.create(image, words):
                break
        if self.random.random() < 0.8:
            self.operations.write()
        for _ in range(self.random.randrange(5, 16)):
            # Each look takes several processes; what is lost stays lost until the end.
            self.judge.compare(image, self.random.random() < 0.3)
            operation = self.operations.draw()
            if operation:
                self.perform(operation)
            self.operations.clean_up()
        for other in self.chain():
            self.judge.compare(other)

    def chain(self):
        """The image `disk` and its backing files."""
        result = [self.images["disk"]]
        while result[-1].backing:
            result.append(self.images[result[-1].backing])
        return result

    def new_base(self, name, may_be_raw, backing=None):
        """Makes an image to be a backing file."""
        while True:
            format = self.random.choice(["raw", "qcow2"]) if may_be_raw else "qcow2"
            image, words = new_image(self.random, name, backing, format, is_plain=True)
            if self.create(image, words):
                break
        writes = Writes(self.random, image).add(self.random.randrange(1, 6))
        self.operations.write_by_qemu(writes, image)
        if format == "qcow2" and not image.is_version_2 and self.random.random() < 0.2:
            image.bitmaps["kept"] = Bitmap(4096, True)
            self.run(["qemu-img", "bitmap", "--add", "-g", "4096", name, "kept"])
        if format == "qcow2" and self.random.random() < 0.2:
            taken = self.run(["qemu-img", "snapshot", "-c", "kept", name])
            if taken.status == 0:
                image.snapshots["kept"] = image.disk.copy()
            image.is_untidy = taken.status != 0
            self.operations.write_by_qemu(Writes(self.random, image).add(2), image)
        return image

    def create(self, image, words):
        """Makes an image by one of the programs; returns whether it could be made."""
        # qemu-img measures the processor for seconds before it makes a key.
        created = Operation(words, lambda _: None,
                            qemu_has_it=not image.is_encrypted or self.random.random() < 0.1)
        self.images[image.name] = image
        if self.perform(created):
            return True
        del self.images[image.name]
        return False

    def perform(self, operation):
        """Has one of the programs carry it out; returns whether it did."""
        verb = operation.words[0]
        by_swimg = (operation.is_for_swimg or not operation.qemu_has_it
                    or self.random.random() < 0.75)
        if not by_swimg:
            outcome = self.run(["qemu-img", *operation.words])
            self.counts[f"qemu-img {verb}"] += 1
            return self._finish(operation, outcome, False)
        theirs = None
        if operation.qemu_has_it:
            copy_files(self.folder, self.twin)
            theirs = execute("qemu-img", ["qemu-img", *operation.words], self.twin)
        outcome = self.run(["swimg", *operation.words])
        self.counts[f"swimg {verb}"] += 1
        if theirs and operation.is_like_qemu and (theirs.status == 0) != (outcome.status == 0):
            who, said = (("qemu-img", theirs) if theirs.status else ("swimg", outcome))
            known = next((n for n, p in KNOWN[who] if re.search(p, said.stderr)), None)
            if not known:
                raise Finding(f"qemu-img {theirs.status} {theirs.stderr.strip()}\n"
                              f"swimg {outcome.status} {outcome.stderr.strip()}")
            self.counts[f"known: {known}"] += 1
        if outcome.status == 0 and outcome.stderr and not re.search(EXPECTED, outcome.stderr):
            raise Finding(f"swimg says {outcome.stderr}")
        if outcome.status not in [0, 1]:
            raise Finding(f"swimg {outcome.status} {outcome.stderr}")
        finished = self._finish(operation, outcome, True)
        if finished and theirs and theirs.status == 0 and operation.has_equal_twin:
            self._compare_with_twin()
        return finished

    def _compare_with_twin(self):
        """What only the tables tell has to be the same in both programs' images."""
        for image in self.chain():
            for snapshot in [None, *image.snapshots]:
                theirs = self.twin_judge.read(image, snapshot)
                difference = theirs.difference(self.judge.read(image, snapshot))
                if difference:
                    raise Finding(f"not as qemu-img: {image.name}, {snapshot}: {difference}")

    def _finish(self, operation, outcome, by_swimg):
        if outcome.status == 0:
            operation.apply(by_swimg)
        else:
            self.counts[f"refused: {operation.words[0]}"] += 1
            if not by_swimg and operation.fail:
                operation.fail()
        if not by_swimg:
            self.take_dirtiness()
        return outcome.status == 0

    # What only qemu's programs can tell

    def take_dirtiness(self):
        """qemu-img repairs images that were not closed cleanly when it changes them."""
        image = self.images.get("disk")
        if image and image.is_dirty:
            image.is_dirty = self.judge.facts(image).get("dirty-flag", False)

    def take_bitmaps(self, image):
        for name, bitmap in image.bitmaps.items():
            if bitmap.is_enabled and not bitmap.is_broken:
                bitmap.bits = self.judge.bits(image, name, bitmap.granularity)

    def take_options(self, image):
        data = self.judge.facts(image)["format-specific"]["data"]
        image.is_version_2 = data["compat"] == "0.10"
        image.refcount_bits = data["refcount-bits"]

    def take_after_death(self, image):
        """After a program has died while it wrote."""
        image.disk = self.judge.read(image)
        facts = self.judge.facts(image)
        image.is_untidy, image.is_dirty = True, facts.get("dirty-flag", False)
        for shown in facts["format-specific"]["data"].get("bitmaps", []):
            image.bitmaps[shown["name"]].is_broken = "in-use" in shown["flags"]


def run_one(job):
    """Returns the log and the finding, or None, and the counts."""
    program, seed, room, settings = job
    folder = tempfile.mkdtemp(dir=room)
    sequence = Sequence(program, seed, folder)
    finding = None
    try:
        Conversions(sequence).play() if settings.conversions else sequence.play()
    except (Finding, subprocess.SubprocessError, OSError, KeyError, ValueError) as error:
        finding = str(error) if isinstance(error, Finding) else repr(error)
        if settings.keep:
            copy_files(sequence.folder, os.path.join(room, f"kept{seed}"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return seed, sequence.log, finding, sequence.counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("swimg")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--conversions", action="store_true", help="convert, and nothing else")
    parser.add_argument("--keep", action="store_true", help="keep the files of failures")
    settings = parser.parse_args()
    began = time.monotonic()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    room = tempfile.mkdtemp(prefix="sequences.",
                            dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    program = os.path.realpath(settings.swimg)
    jobs = [(program, settings.seed + i, room, settings) for i in range(settings.count)]
    counts, failures = collections.Counter(), []
    with multiprocessing.Pool(settings.jobs) as pool:
        for number, (seed, log, finding, counted) in enumerate(pool.imap_unordered(run_one, jobs)):
            counts += counted
            if finding:
                failures.append(seed)
                print(f"\n=== --seed {seed} --count 1\n" + "\n".join(log) + f"\n--- {finding}",
                      flush=True)
            if (number + 1) % 100 == 0:
                print(f"{number + 1} sequences, {len(failures)} failures, "
                      f"{time.monotonic() - began:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"    {count:6} {name}")
    print(f"{settings.count} sequences from seed {settings.seed} on, {len(failures)} failures"
          f"{failures or ''}, {time.monotonic() - began:.0f} s")
    if settings.keep and failures:
        print(f"files: {room}")
    else:
        shutil.rmtree(room, ignore_errors=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
