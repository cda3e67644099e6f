"""Collects fixtures: writes each file (gzipped when large) and its line in the manifest."""

import gzip
import hashlib
import json
import pathlib
import struct

# Larger files are mostly zeros; stored gzipped they stay small in a checkout as well as in git.
PLAIN_LIMIT = 4096


class FixtureSet:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.entries = []

    def write(self, name, data):
        """A file without an entry of its own (a backing file)."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(data) <= PLAIN_LIMIT:
            path.write_bytes(data)
            return
        packed = bytearray(gzip.compress(bytes(data), 9, mtime=0))
        packed[9] = 3  # The "operating system" byte: Python releases differ in it.
        path.with_name(path.name + ".gz").write_bytes(packed)

    def good(self, name, data, content, made, format="qcow2", **more):
        """An image that must convert; the disk is padded to whole sectors as qemu-img does."""
        self.write(name, data)
        content = bytes(content) + bytes(-len(content) % 512)
        self.entries.append({
            "file": name, "made": made, "format": format, "virtual-size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(), **more})

    def refused(self, name, data, made, says, format="qcow2", **more):
        """An image that must not convert; `says` stands in the message.

        Without a format it is one that probing must recognise.
        """
        if data is not None:
            self.write(name, data)
        self.entries.append({"file": name, "made": made, "format": format, "refused": says, **more})

    def manifest(self):
        lines = ",\n".join("  " + json.dumps(entry) for entry in self.entries)
        path = self.folder.parent / "manifest.json"
        path.write_text("[\n" + lines + "\n]\n")


def pack_fields(length, *fields):
    """A blank header of `length` bytes with (offset, layout, values...) packed into it."""
    out = bytearray(length)
    for at, layout, *values in fields:
        struct.pack_into(layout, out, at, *values)
    return out
