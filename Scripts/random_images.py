"""Random images for side-by-side.py, made by qemu-img and qemu-io from a seed; some are damaged.

An image is a folder with a file `disk` and its backing files. `recipe` lists the commands that made
it, so that an image that shows a difference can be made again by hand.
"""

import os
import random
import shutil
import struct
import subprocess

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class RandomImage:
    """Image number `index` of a seed, in an existing empty folder."""

    def __init__(self, seed, index, folder):
        self.random = random.Random(f"{seed}/{index}")
        self.folder = folder
        self.recipe = []
        self.name = "disk"
        self.format = "raw" if self.random.random() < 0.15 else "qcow2"
        self.snapshots = 0
        self.cluster = 64 * KIB
        backing = self._backing(self.random.choice([0, 0, 0, 1, 1, 2])) if self.format == "qcow2" else None
        self.size = self._create(self.name, self.format, backing)
        self._fill(self.name, self.format, self.size)
        if self.format == "qcow2":
            self._add_tails()
        if self.random.random() < 0.3:
            self._damage()
        self.path = os.path.join(folder, self.name)

    # Making

    def _qemu(self, program, *words):
        """Runs a program and returns whether it succeeded; refused options are left out."""
        outcome = subprocess.run([program, *words], cwd=self.folder, stdin=subprocess.DEVNULL,
                                 capture_output=True, timeout=60)
        self.recipe.append(" ".join([program, *(f"'{w}'" if " " in w else w for w in words)])
                           + ("" if outcome.returncode == 0 else "  (refused)"))
        return outcome.returncode == 0

    def _size(self):
        pick = self.random.random()
        if pick < 0.05:
            return 0
        if pick < 0.15:
            return self.random.randrange(1, 200) * 512
        if pick < 0.25:
            return self.random.randrange(1, 3 * MIB)
        if pick < 0.9:
            return self.random.randrange(1, 8 * MIB // 512) * 512
        return self.random.choice([GIB, 5 * GIB + 512, 64 * GIB])

    def _backing(self, depth):
        if depth == 0:
            return None
        below = self._backing(depth - 1)
        format = "qcow2" if below else self.random.choice(["raw", "qcow2"])
        name = f"base{depth}"
        self._fill(name, format, self._create(name, format, below))
        return name, format

    def qcow2_options(self):
        """Random options of a new image, by key."""
        random, options = self.random, {}
        old = random.random() < 0.2
        if old or random.random() < 0.3:
            options["compat"] = "0.10" if old else "1.1"
        if random.random() < 0.6:
            options["cluster_size"] = random.choice(
                [512, 1024, 2048, 4096, 4096, 16384, 32768, 65536, 262144, 2 * MIB])
        if not old:
            if random.random() < 0.4:
                options["refcount_bits"] = random.choice([1, 2, 4, 8, 16, 32, 64])
            if random.random() < 0.2:
                options["lazy_refcounts"] = random.choice(["on", "off"])
            if random.random() < 0.2 and options.get("cluster_size", 65536) >= 16384:
                options["extended_l2"] = "on"
            if random.random() < 0.3:
                options["compression_type"] = random.choice(["zlib", "zstd"])
        if random.random() < 0.25:
            options["preallocation"] = random.choice(["off", "metadata", "falloc", "full"])
        return options

    def _create(self, name, format, backing):
        random, size = self.random, self._size()
        for attempt in range(4):
            words = ["create", "-q", "-f", format]
            if format == "qcow2":
                options = self.qcow2_options() if attempt < 3 else {}
                if size > 64 * MIB or (backing and options.get("extended_l2") != "on"):
                    options.pop("preallocation", None)
                if options:
                    words += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
                self.cluster = int(options.get("cluster_size", 65536))
            if backing:
                words += ["-b", backing[0], "-F", backing[1]]
            if self._qemu("qemu-img", *words, name, str(size)):
                return size
            size = min(size, 8 * MIB)
        raise RuntimeError("\n".join(self.recipe))

    def _write(self, size):
        """A qemu-io command that changes a part of the disk."""
        random = self.random
        unit = random.choice([512, 4096, self.cluster])
        offset = random.randrange(max(1, min(size, 8 * MIB) // unit)) * unit
        if size > GIB and random.random() < 0.3:
            offset = size // 512 * 512 - unit
        length = max(512, min(unit * random.randrange(1, 9), (size - offset) // 512 * 512, 2 * MIB))
        pattern = random.randrange(0, 256)
        return random.choice([f"write -P {pattern}", f"write -P {pattern}", f"write -P {pattern}", "write -P 0",
                              "write -z", "write -z -u", "discard"]) + f" {offset} {length}"

    def _fill(self, name, format, size):
        if size < 512 or self.random.random() < 0.1:
            return
        commands = [self._write(size) for _ in range(self.random.randrange(1, 12))]
        if format == "qcow2" and self.random.random() < 0.4:
            for _ in range(self.random.randrange(1, 6)):
                cluster = self.random.randrange(max(1, min(size, 4 * MIB) // self.cluster))
                commands.append(f"write -c -P {self.random.randrange(256)} {cluster * self.cluster} {self.cluster}")
        self._io(name, format, commands)

    def _io(self, name, format, commands):
        self._qemu("qemu-io", "-f", format, *(word for command in commands for word in ("-c", command)), name)

    def _add_tails(self):
        random = self.random
        if random.random() < 0.25:
            for number in range(random.randrange(1, 4)):
                self.snapshots += self._qemu("qemu-img", "snapshot", "-c", f"s{number}", self.name)
                self._fill(self.name, "qcow2", self.size)
        if random.random() < 0.2:
            for number in range(random.randrange(1, 3)):
                self._qemu("qemu-img", "bitmap", "--add", *(["--disable"] if random.random() < 0.4 else []),
                           "-g", random.choice(["64k", "1M"]), self.name, f"b{number}")
            self._fill(self.name, "qcow2", self.size)

    # Damage

    def _damage(self):
        with open(os.path.join(self.folder, self.name), "r+b") as file:
            data = file.read(MIB)
            places = [self._truncate]
            if self.format == "qcow2":
                places = [self._header, self._header, self._l1, self._l2, self._l2, self._l2,
                          self._refcounts, self._refcounts, self._refcounts, self._truncate]
            for _ in range(self.random.randrange(1, 3)):
                self.random.choice(places)(file, data)

    def _patch(self, file, offset, value, width=8):
        file.seek(offset)
        file.write(value.to_bytes(width, "big"))
        self.recipe.append(f"patch: {width} bytes at {offset}: {value:#x}")

    @staticmethod
    def _word(file, offset):
        file.seek(offset)
        return int.from_bytes(file.read(8).ljust(8, b"\0"), "big")

    def _truncate(self, file, data):
        length = file.seek(0, os.SEEK_END)
        new = self.random.choice([length // 2, length - 1, length * 3 // 4, max(0, length - self.cluster)])
        file.truncate(max(0, new))
        self.recipe.append(f"truncate to {new}")

    def _header(self, file, data):
        random = self.random
        offset, width, values = random.choice([
            (0, 4, [0, 0x514649fa]), (4, 4, [0, 1, 2, 3, 4]), (8, 8, [1, 1 << 20, 1 << 63]),
            (16, 4, [1, 1023, 1024, 0xffffffff]), (20, 4, [0, 8, 9, 12, 21, 22, 63]),
            (24, 8, [0, 1, 511, 1 << 40, 1 << 62, (1 << 64) - 1]), (32, 4, [1, 2, 3]),
            (36, 4, [0, 1, 100, 0xffffffff]), (40, 8, [0, 1, 512, 1 << 62]), (48, 8, [0, 1, 1 << 20, 1 << 62]),
            (56, 4, [0, 1, 2, 0xffffffff]), (60, 4, [0, 1, 5, 65536, 65537]), (64, 8, [0, 8, 65536, 1 << 62]),
            (72, 8, [1, 2, 3, 4, 8, 16, 32, 1 << 40]), (80, 8, [1, 2, 1 << 30]), (88, 8, [1, 2, 3, 1 << 20]),
            (96, 4, [0, 4, 6, 7, 255]), (100, 4, [0, 72, 104, 108, 112, 0xffffffff]), (104, 1, [0, 1, 2, 255])])
        self._patch(file, offset, random.choice(values), width)

    def _entry(self, value):
        random = self.random
        return random.choice([
            value ^ 1 << 63, value ^ 1 << 62, value | 1, value ^ 1, value | 2, value | 1 << 58, value + 512,
            value + self.cluster, value + (1 << 40), value + (1 << 56), 0, random.getrandbits(64)]) & ((1 << 64) - 1)

    def _table(self, file, offset, entries):
        if 0 < offset < file.seek(0, os.SEEK_END) and entries > 0:
            place = offset + 8 * self.random.randrange(entries)
            self._patch(file, place, self._entry(self._word(file, place)))

    def _l1(self, file, data):
        entries, offset = struct.unpack(">IQ", data[36:48])
        self._table(file, offset, min(entries, 4))

    def _l2(self, file, data):
        offset = struct.unpack(">Q", data[40:48])[0]
        if offset < file.seek(0, os.SEEK_END):
            self._table(file, self._word(file, offset) & 0x00fffffffffffe00, 16)

    def _refcounts(self, file, data):
        random = self.random
        table = struct.unpack(">Q", data[48:56])[0]
        if random.random() < 0.3:
            return self._table(file, table, 2)
        block = self._word(file, table)
        if 0 < block < file.seek(0, os.SEEK_END):
            self._patch(file, block + random.randrange(32), random.choice([0, 1, 2, 3, 0x55, 0xff]), 1)


def unpack_fixtures(source, target):
    """Unpacks `.gz` files and restores holes, as Tests/TestSupport/Fixtures.swift does."""
    for folder, _, files in os.walk(source):
        place = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(place, exist_ok=True)
        for name in files:
            path = os.path.join(folder, name)
            if name.endswith(".gz"):
                with open(os.path.join(place, name[:-3]), "wb") as out:
                    unpack = subprocess.Popen(["gzip", "-dc", path], stdout=subprocess.PIPE)
                    subprocess.run(["dd", f"of={out.name}", "bs=4096", "conv=sparse", "iflag=fullblock", "status=none"],
                                   stdin=unpack.stdout, check=True)
                    unpack.wait()
            else:
                shutil.copy(path, place)
    os.mkfifo(os.path.join(target, "a-fifo"))
