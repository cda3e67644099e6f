#!/usr/bin/env python3
"""Asks qemu-img about every fixture: same content, `check` clean where the manifest says so.

Exits 1 if an image that must convert reads differently. For the images that must be refused it
prints what qemu-img does, for `docs/differences.md`.
"""

import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile


def unpack(images, target):
    for path in sorted(images.rglob("*")):
        if not path.is_file():
            continue
        place = target / path.relative_to(images)
        place.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        if path.suffix == ".gz":
            place, data = place.with_suffix(""), gzip.decompress(data)
        place.write_bytes(data)
    os.mkfifo(target / "a-fifo")


def qemu_img(*arguments):
    try:
        return subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, timeout=15)
    except subprocess.TimeoutExpired:
        return None


def main():
    images, manifest = pathlib.Path(sys.argv[1]), json.load(open(sys.argv[2]))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        unpack(images, folder)
        for entry in manifest:
            # Cut short, or a loop would take all descriptors: qemu-img is known to fail there.
            if "backing-self" in entry["file"] or "backing-loop" in entry["file"]:
                continue
            path, out = folder / entry["file"], folder / "out.raw"
            form = ["-f", entry["format"]] if entry["format"] else []
            done = qemu_img("convert", *form, "-O", "raw", path, out)
            if "refused" in entry:
                how = "hangs" if done is None else "converts" if done.returncode == 0 else None
                if how:
                    print(f"qemu-img {how}: {entry['file']}: {entry['made']}")
                continue
            digest = hashlib.sha256(out.read_bytes()).hexdigest() if out.exists() else None
            check = qemu_img("check", *form, path) if entry.get("clean") else None
            if done is None or done.returncode or digest != entry["sha256"]:
                print(f"WRONG {entry['file']}: {done and done.stderr.decode()} {digest}")
                wrong += 1
            elif check is not None and check.returncode:
                print(f"NOT CLEAN {entry['file']}: {(check.stdout + check.stderr).decode()}")
                wrong += 1
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
