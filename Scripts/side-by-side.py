#!/usr/bin/env python3
"""Runs the same commands with qemu-img and with swimg linked as qemu-img, and shows what differs.

Usage: side-by-side.py path/to/swimg [--seed N] [--images 200] [--only NAME]

It uses the fixtures and random images. It compares exit codes, stdout and stderr (JSON key by key)
and, for commands that write, the real qemu-img's findings about both results. Differences named in
docs/differences.md are counted (side_by_side_known.py); others are shown and make the exit code 1.
"""

import argparse
import collections
import contextlib
import difflib
import filecmp
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from random_images import MIB, RandomImage, unpack_fixtures
from side_by_side_commands import image_commands, usage_commands
from side_by_side_known import KNOWN

TIMEOUT = 20
MEMORY = 4 << 30
FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "Fixtures", "images")

# Members of info and check that depend on where data is stored (paths of `flat`; "" is the number
# of members).
LAYOUT = ["", "actual-size", "image-end-offset", "allocated-clusters", "compressed-clusters", "fragmented-clusters",
          "total-clusters"]


class Outcome:
    def __init__(self, status, stdout, stderr, seconds):
        self.status, self.stdout, self.stderr, self.seconds = status, stdout, stderr, seconds


class Pair:
    """One command line, run by both programs."""

    old_size = None
    # Whether the disk ends within a sector.
    is_ragged = False
    is_damaged = False

    def __init__(self, image, words, theirs, own, judgement, layout):
        self.image, self.words, self.theirs, self.own = image, words, theirs, own
        # Lines about differences of the results, and about differences that concern only the
        # layout.
        self.judgement, self.layout = judgement, layout

    @property
    def verb(self):
        return self.words[0] if self.words else ""

    def difference(self):
        """Lines that describe all differences; empty if there are none."""
        lines = []
        if self.own.status != self.theirs.status:
            lines.append(f"exit code: {self.theirs.status} {self.own.status}")
        for name in ["stdout", "stderr"]:
            lines += text_difference(name, *(self.normalized(getattr(o, name)) for o in [self.theirs, self.own]))
        return lines + self.judgement + self.layout

    def normalized(self, text):
        """The text with progress reduced to one word, because its frequency depends on time, and without what only
        QEMU 8 and swimg tell."""
        if self.verb == "info":
            text = re.sub(r'(?ms)^( *)"children": \[$.*?^\1\],\n', "", text)
        return re.sub(r"(    \(\d+\.\d\d/100%\)\r)+", "progress ", text) if "-p" in self.words else text

    def explanation(self):
        return next((name for name, explains in KNOWN if explains(self)), None)


def text_difference(name, theirs, own):
    if theirs == own:
        return []
    try:
        before, after = flat(json.loads(theirs)), flat(json.loads(own))
        if before == after:
            return []
        theirs, own = (["\n".join(f"{k} = {v!r}" for k, v in x.items())][0] for x in [before, after])
    except ValueError:
        pass
    lines = list(difflib.unified_diff(theirs.splitlines(), own.splitlines(), "qemu-img " + name, "swimg " + name,
                                      lineterm="", n=0))
    return lines[:14] + ([f"… {len(lines) - 14} more lines"] if len(lines) > 14 else [])


def flat(value, path=""):
    """Maps the paths of a JSON value to plain values."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if members is None:
        return {path: value}
    result = {path: f"{len(value)} members"}
    for key, member in members:
        result.update(flat(member, f"{path}/{key}"))
    return result


class Bench:
    """Two folders, one for each program, with the same files under the same names."""

    def __init__(self, program, folder, image_folder, name):
        self.programs = {"theirs": shutil.which("qemu-img"), "own": program}
        self.name = name
        self.folders = {side: os.path.join(folder, side) for side in self.programs}
        self.fresh = os.path.join(image_folder, name) if name else None
        self.size = None
        self.is_ragged = ends_within_sector(self.fresh)
        if name and "fifo" not in name:
            shown = execute(self.programs["theirs"], ["info", "--output=json", self.fresh], image_folder)
            self.size = json.loads(shown.stdout)["virtual-size"] if shown.status == 0 else None
        for place in self.folders.values():
            os.makedirs(place)
            for other in os.listdir(image_folder) if name else []:
                os.symlink(os.path.join(image_folder, other), os.path.join(place, other))

    def run(self, image, command):
        for place in self.folders.values():
            if command.prepare:
                command.prepare(place)
            if command.changes:
                copy(self.fresh, os.path.join(place, "copy"))
        theirs, own = (execute(self.programs[side], command.words, place) for side, place in self.folders.items())
        judged = self.judge(command.judged, theirs.status) if theirs.status == own.status else ([], [])
        for place in self.folders.values():
            for name in ["out", "copy", "data"]:
                if os.path.lexists(os.path.join(place, name)):
                    os.remove(os.path.join(place, name))
        pair = Pair(image, command.words, theirs, own, *judged)
        pair.old_size = self.size
        pair.is_ragged = self.is_ragged
        return pair

    def judge(self, judged, status):
        """Compares the real qemu-img's findings about both results; returns lines about differences
        and lines about mere layout."""
        lines, moved = [], []
        if judged is None or (status != 0 and judged[0] == "out"):
            return lines, moved
        name, format = judged
        paths = [os.path.join(place, name) for place in self.folders.values()]
        there = [os.path.exists(path) for path in paths]
        if there[0] != there[1]:
            return [f"result: there {there}"], moved
        # Large results are mostly holes, which only qemu-img skips.
        if not there[0] or os.path.getsize(paths[0]) < 64 * MIB and filecmp.cmp(*paths, shallow=False):
            return lines, moved
        for words in [["info", "--output=json", "-f", format, name]] + (
                [["check", "--output=json", "-f", format, name]] if format == "qcow2" else []):
            found = [execute(self.programs["theirs"], words, place) for place in self.folders.values()]
            if found[0].status != found[1].status:
                lines.append(f"{words[0]} of the result: exit code {found[0].status} {found[1].status} "
                             + found[1].stderr)
            values = [json.loads(o.stdout) if o.status in [0, 2, 3] else o.stdout for o in found]
            facts = [{k: v for k, v in flat(value).items() if k.strip("/") not in LAYOUT} for value in values]
            if facts[0] != facts[1]:
                lines += text_difference(words[0] + " of the result", *(json.dumps(value) for value in values))
            elif words[0] == "check":
                moved += text_difference(words[0] + " of the result", *(o.stdout for o in found))
        words = ["compare", "-f", format, "-F", format, *paths]
        outcome = execute(self.programs["theirs"], words, self.folders["own"])
        # Status 1 means that the disks differ; damaged images cannot be read and give another
        # status.
        if outcome.status == 1:
            lines.append("compare of the results: " + outcome.stdout.strip())
        return lines, moved


def ends_within_sector(path):
    """Whether a qcow2 disk ends within a sector (QEMU's docs/interop/qcow2.txt, "Header")."""
    if not path or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        header = file.read(32)
    return header[:4] == b"QFI\xfb" and int.from_bytes(header[24:], "big") % 512 != 0


def copy(source, target):
    subprocess.run(["cp", "--sparse=auto", "--reflink=never", source, target], check=True)


def execute(program, words, folder):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    began = time.monotonic()
    process = subprocess.Popen([program, *words], executable=program, cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=limit,
                               start_new_session=True, env={**os.environ, "LC_ALL": "C"})
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        status = "timeout"
    text = [t.decode("utf-8", "backslashreplace").replace(program, "qemu-img") for t in [stdout, stderr]]
    return Outcome(status, text[0], text[1], time.monotonic() - began)


def run_case(case):
    """Runs all commands of one image and returns their words and differences."""
    settings, kind, what = case
    folder = tempfile.mkdtemp(dir=settings.folder)
    recipe = []
    try:
        chosen = random.Random(f"{settings.seed}/{what}")
        if kind == "random":
            place = os.path.join(folder, "image")
            os.mkdir(place)
            image = RandomImage(settings.seed, what, place)
            recipe, label = image.recipe, f"image {what}"
            bench = Bench(settings.program, folder, place, image.name)
            commands = image_commands(chosen, image.name, image.format, image.size, image.snapshots, bench.folders)
        elif kind == "fixture":
            label = what
            bench = Bench(settings.program, folder, settings.fixtures, what)
            format = "raw" if what.endswith(".raw") else "qcow2"
            commands = image_commands(chosen, what, format, MIB, 0, bench.folders, few=True)
        else:
            label = "usage"
            bench = Bench(settings.program, folder, None, None)
            commands = usage_commands(what, bench.folders)
        pairs = []
        for command in commands:
            pair = bench.run(label, command)
            pair.is_damaged = label.startswith("bad-") or any(
                line.startswith(("patch", "truncate")) for line in recipe)
            lines = pair.difference()
            known = lines and pair.explanation()
            slow = pair.own.seconds > 2 and pair.own.seconds > 3 * pair.theirs.seconds
            pairs.append((label, pair.words, lines, known, slow and (pair.theirs.seconds, pair.own.seconds)))
        return pairs, recipe
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("swimg")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--only", help="one image (a number, a fixture, or usage)")
    settings = parser.parse_args()
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    settings.folder = tempfile.mkdtemp(prefix="side-by-side.", dir=room)
    settings.program = os.path.join(settings.folder, "bin", "qemu-img")
    settings.fixtures = os.path.join(settings.folder, "fixtures")
    os.mkdir(os.path.dirname(settings.program))
    os.symlink(os.path.realpath(settings.swimg), settings.program)
    try:
        sys.exit(compare_all(settings))
    finally:
        shutil.rmtree(settings.folder, ignore_errors=True)


def compare_all(settings):
    began = time.monotonic()
    unpack_fixtures(FIXTURES, settings.fixtures)
    fixtures = sorted(n for n in os.listdir(settings.fixtures) if os.path.isfile(os.path.join(settings.fixtures, n)))
    cases = ([(settings, "usage", settings.seed)] + [(settings, "fixture", name) for name in fixtures]
             + [(settings, "random", number) for number in range(settings.images)])
    if settings.only:
        cases = [c for c in cases if settings.only in (str(c[2]), c[1])]
    counts, unknown, verbs = collections.Counter(), 0, collections.Counter()
    with multiprocessing.Pool(2) as pool, contextlib.suppress(KeyboardInterrupt):
        for pairs, recipe in pool.imap_unordered(run_case, cases):
            shown = False
            for label, words, lines, known, slow in pairs:
                verbs[words[0] if words else ""] += 1
                if slow:
                    print(f"slow: {label}: {' '.join(words)}: {slow[0]:.1f} s and {slow[1]:.1f} s", flush=True)
                if not lines or known:
                    counts[known or ""] += 1
                    continue
                unknown += 1
                if not shown:
                    print("\n".join([f"\n=== {label}"] + ["    " + line for line in recipe]))
                    shown = True
                print(f"--- {label}: qemu-img {' '.join(words)}")
                print("\n".join("    " + line for line in lines), flush=True)
    equal = counts.pop("", 0)
    total = equal + unknown + sum(counts.values())
    print(f"\n{total} commands ({', '.join(f'{v} {n}' for v, n in verbs.most_common() if v)}), seed {settings.seed}, "
          f"{time.monotonic() - began:.0f} s")
    print(f"{equal} equal\n{sum(counts.values())} known differences")
    for name, count in counts.most_common():
        print(f"    {count:6} {name}")
    print(f"{unknown} unknown differences")
    return 1 if unknown else 0


if __name__ == "__main__":
    main()
