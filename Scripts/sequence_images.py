"""Random images and random writes for sequences.py; all offsets are bytes."""

import random
import struct

from sequence_model import SECRET, Disk, Image

KIB, MIB = 1 << 10, 1 << 20
CLUSTERS = [512, 1024, 2048, 4096, 4096, 16384, 32768, 65536, 65536, 65536, 262144, 2 * MIB]
# A length that no cluster size divides, so that data in the wrong place is noticed.
PATTERN = random.Random(7).randbytes(100_003)
PATTERN_COMMAND = ("python3 -c 'import random; "
                   "open(\"pattern\", \"wb\").write(random.Random(7).randbytes(100003))'")


LUKS = {"key-secret": "s", "iter-time": 10}


def random_size(random):
    """The size of a disk, a multiple of 512."""
    pick = random.random()
    if pick < 0.05:
        return random.randrange(1, 40) * 512
    if pick < 0.12:
        return random.randrange(100, 300) * MIB + random.choice([0, 512, 65536])
    if pick < 0.5:
        return random.randrange(1, 9) * MIB
    return random.randrange(2 * KIB, 16 * KIB) * 512


def random_options(random, is_plain=False):
    """Options of a new qcow2 image, by key."""
    options = {"cluster_size": random.choice(CLUSTERS)}
    cluster = options["cluster_size"]
    if random.random() < 0.15:
        options["compat"] = "0.10"
    else:
        if random.random() < 0.5:
            options["refcount_bits"] = random.choice([1, 2, 4, 8, 16, 32, 64])
        if random.random() < 0.35:
            options["lazy_refcounts"] = "on"
        if cluster >= 16384 and random.random() < 0.3:
            options["extended_l2"] = "on"
        if random.random() < 0.3:
            options["compression_type"] = random.choice(["zlib", "zstd"])
        if not is_plain and random.random() < 0.05:
            options["data_file"] = "data"
            if random.random() < 0.5:
                options["data_file_raw"] = "on"
        likelihood = 0.4 if "data_file" in options else 0.06
        if not is_plain and "data_file_raw" not in options and random.random() < likelihood:
            options["encrypt.format"] = "luks"
            options["encrypt.key-secret"] = "s"
            options["encrypt.iter-time"] = 10
    if random.random() < 0.15:
        options["preallocation"] = random.choice(["metadata", "falloc", "full"])
    return options


def option_words(options):
    words = ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    return (SECRET if any("key-secret" in key for key in options) else []) + words


def new_image(random, name, backing=None, format="qcow2", size=None, is_plain=False):
    """An image as it should be after its creation, and the words that create it."""
    size = size or random_size(random)
    if format == "luks":
        size = min(size, 8 * MIB)
    options = LUKS if format == "luks" else {}
    if format == "qcow2":
        options = random_options(random, is_plain)
    # Empty clusters of encrypted images decrypt to noise.
    if (size > 16 * MIB or "encrypt.format" in options
            or (backing and options.get("extended_l2") != "on")):
        options.pop("preallocation", None)
    if backing and options.pop("data_file", None):
        # A raw data file has no backing file.
        options.pop("data_file_raw", None)
    image = Image(name, format, Disk(size), backing.name if backing else None, options)
    if backing:
        image.disk.put(backing.disk, 0, min(size, backing.disk.size))
    words = ["create", "-q", "-f", format]
    words += option_words(options) if options else []
    words += ["-b", backing.name, "-F", backing.format] if backing else []
    return image, [*words, name, str(size)]


class Writes:
    """Commands of qemu-io that change an image, and what they make of it."""

    def __init__(self, random, image):
        self.random, self.image = random, image
        self.commands, self.steps = [], []
        # Ranges of which only qemu-io knows what they hold.
        self.unsure = []

    def add(self, count):
        for _ in range(count):
            self._add_one()
        return self

    def _range(self):
        random, image = self.random, self.image
        size = image.disk.size
        unit = random.choice([512, 4096, image.cluster, image.cluster])
        reach = size if random.random() < 0.3 else min(size, 2 * MIB)
        offset = random.randrange(max(1, reach // unit)) * unit
        length = min(unit * random.randrange(1, random.choice([2, 5, 12])), size - offset, MIB)
        return offset, length

    def _add_one(self):
        offset, length = self._range()
        pick = self.random.random()
        if pick < 0.35:
            byte = self.random.randrange(1, 256)
            self._note(f"write -P {byte} {offset} {length}", offset, bytes([byte]) * length)
        elif pick < 0.65:
            data = (PATTERN * (length // len(PATTERN) + 1))[:length]
            self._note(f"write -s pattern {offset} {length}", offset, data)
        elif pick < 0.85:
            kind = self.random.choice(["-z", "-z -u", "-P 0"])
            self._note(f"write {kind} {offset} {length}", offset, bytes(length))
        else:
            self.unsure.append((offset, offset + length))
            self._note(f"discard {offset} {length}", offset, bytes(length))

    def add_compressed(self):
        cluster, size = self.image.cluster, self.image.disk.size
        offset = self.random.randrange(max(1, min(size, 4 * MIB) // cluster)) * cluster
        length = min(cluster, size - offset)
        byte = self.random.randrange(1, 256)
        self._note(f"write -c -P {byte} {offset} {length}", offset, bytes([byte]) * length)
        return self

    def _note(self, command, offset, data):
        self.commands.append(command)
        self.steps.append((offset, data))

    @property
    def words(self):
        commands = [word for command in self.commands for word in ("-c", command)]
        return ["qemu-io", *commands, *self.image.named]

    def apply(self, read):
        """Changes the model.

        - read: returns the disk as qemu-img reads it.
        """
        for offset, data in self.steps:
            self.image.disk.write(offset, data)
            self.image.record(offset, offset + len(data))
        if self.unsure:
            shown = read()
            for start, end in self.unsure:
                self.image.disk.put(shown, start, end)


def leak(random, path):
    """Raises the refcount of a free cluster; returns the shell command that does it, or None if
    there is no room in the first refcount block.
    """
    with open(path, "r+b") as file:
        header = file.read(104)
        bits = 16 if header[7] == 2 else 1 << struct.unpack(">I", header[96:100])[0]
        cluster = 1 << struct.unpack(">I", header[20:24])[0]
        file.seek(struct.unpack(">Q", header[48:56])[0])
        block = struct.unpack(">Q", file.read(8))[0]
        # `check` of both programs does not look at counts behind the end of the file.
        count = min(cluster * 8 // bits, file.seek(0, 2) // cluster)
        file.seek(block)
        counts = file.read(-(-count * bits // 8))

        def value(index):
            if bits < 8:
                return counts[index * bits // 8] >> index * bits % 8 & (1 << bits) - 1
            return int.from_bytes(counts[index * bits // 8:(index + 1) * bits // 8], "big")

        free = [index for index in range(count) if value(index) == 0]
        if not free or not block:
            return None
        index = random.choice(free)
        # The lowest bit of the count: within the byte, or in the last byte.
        at = index * bits // 8 if bits < 8 else (index + 1) * bits // 8 - 1
        byte = counts[at] | 1 << (index * bits % 8 if bits < 8 else 0)
        file.seek(block + at)
        file.write(bytes([byte]))
    return f"printf '\\{byte:03o}' | dd of=disk bs=1 seek={block + at} conv=notrunc status=none"
