"""The images that the benchmarks read, made once and kept."""

import contextlib
import os
import random
import subprocess
import sys
import tempfile

DISK_SIZE = 8 << 30
FILE_BYTES = 3_400_000_000
PART_SIZE = 1536 << 20
CLUSTER = 65536
SCATTERED_CLUSTERS = 131072


def run(*command, **options):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def make_disk(path):
    """Makes an ext4 file system with files of all kinds and sizes from this machine."""
    folder = os.path.dirname(path)
    with tempfile.TemporaryDirectory(dir=folder) as files:
        total = 0
        for root in ["/usr", "/opt"]:
            for place, _, names in os.walk(root):
                target = files + place
                made = False
                for name in names:
                    source = os.path.join(place, name)
                    if os.path.islink(source) or not os.access(source, os.R_OK):
                        continue
                    size = os.path.getsize(source)
                    if size > 512 << 20 or total + size > FILE_BYTES:
                        continue
                    if not made:
                        os.makedirs(target, exist_ok=True)
                        made = True
                    run("cp", source, target)
                    total += size
        if total < 3 << 30:
            sys.exit(f"this machine has only {total} bytes of files under /usr and /opt")
        plain = path + ".plain"
        with open(plain, "wb") as file:
            file.truncate(DISK_SIZE)
        run("mkfs.ext4", "-q", "-F", "-d", files, plain)
        run("cp", "--sparse=always", plain, path)
        os.unlink(plain)


def make_part(path, disk):
    """Copies the first part of the disk, for slow cases."""
    plain = path + ".plain"
    with open(plain, "wb") as file:
        run_to = subprocess.run(["head", "-c", str(PART_SIZE), disk], check=True, stdout=file)
        assert run_to.returncode == 0
    run("cp", "--sparse=always", plain, path)
    os.unlink(plain)


def make_scattered(path):
    """Makes an image with data in every other cluster, written in random order."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(2 * SCATTERED_CLUSTERS * CLUSTER))
    order = list(range(SCATTERED_CLUSTERS))
    random.Random(1).shuffle(order)
    lines = (f"write -q -P {index % 255 + 1} {2 * index * CLUSTER} {CLUSTER}\n" for index in order)
    run("qemu-io", "-t", "unsafe", "-f", "qcow2", path, input="".join(lines), text=True)


def make_zeros(path):
    with open(path, "wb") as file:
        for _ in range(4 << 10):
            file.write(bytes(1 << 20))


def convert(source, source_format, path, *options):
    run("qemu-img", "convert", "-m", "8", "-W", "-f", source_format, "-O", "qcow2", *options,
        source, path)


def prepare(folder):
    """Makes the missing images."""
    zstd = ["-c", "-o", "compression_type=zstd"]
    disk, part = f"{folder}/disk.raw", f"{folder}/part.raw"
    recipes = [
        ("disk.raw", make_disk),
        ("disk.qcow2", lambda path: convert(disk, "raw", path)),
        ("part.raw", lambda path: make_part(path, disk)),
        ("zlib.qcow2", lambda path: convert(disk, "raw", path, "-c")),
        ("zstd.qcow2", lambda path: convert(disk, "raw", path, *zstd)),
        ("scattered.qcow2", make_scattered),
        ("metadata.qcow2", lambda path: run(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "1T")),
        ("empty.qcow2", lambda path: run("qemu-img", "create", "-q", "-f", "qcow2", path, "8T")),
        ("zeros.raw", make_zeros),
        ("tiny.raw", lambda path: run(
            "dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=1", "status=none")),
    ]
    for name, make in recipes:
        path = f"{folder}/{name}"
        if not os.path.exists(path):
            print(f"making {path} ...", file=sys.stderr)
            make(path + ".tmp")
            os.rename(path + ".tmp", path)


def compressed_clusters(image, path):
    """Lists the data clusters of an image for floor.c, one per line: file offset, length, guest
    offset (all in bytes), and 1 if the cluster is not compressed. Source: qcow2 specification."""
    with open(image, "rb") as file, open(path, "w") as out:
        header = file.read(104)
        number = lambda at, count: int.from_bytes(header[at:at + count], "big")
        bits, size = number(20, 4), number(24, 8)
        l1_count, l1_offset = number(36, 4), number(40, 8)
        file.seek(l1_offset)
        l1 = file.read(8 * l1_count)
        shift = 62 - (bits - 8)
        for index in range(l1_count):
            table = int.from_bytes(l1[8 * index:8 * index + 8], "big") & 0x00FF_FFFF_FFFF_FE00
            if not table:
                continue
            file.seek(table)
            l2 = file.read(1 << bits)
            for slot in range((1 << bits) // 8):
                entry = int.from_bytes(l2[8 * slot:8 * slot + 8], "big")
                guest = (index * ((1 << bits) // 8) + slot) << bits
                if entry >> 62 & 1:
                    offset = entry & ((1 << shift) - 1)
                    sectors = (entry >> shift & ((1 << (bits - 8)) - 1)) + 1
                    length = sectors * 512 - offset % 512
                    out.write(f"{offset} {length} {guest} 0\n")
                elif entry & 0x00FF_FFFF_FFFF_FE00 and not entry & 1:
                    length = min(1 << bits, size - guest)
                    out.write(f"{entry & 0x00FF_FFFF_FFFF_FE00} {length} {guest} 1\n")


@contextlib.contextmanager
def mounted(file_system, folder, size):
    """A new file system in a file, mounted. Needs root."""
    disk, place = f"{folder}/{file_system}.disk", f"{folder}/{file_system}.mount"
    os.makedirs(place, exist_ok=True)
    if os.path.ismount(place):
        # A killed run left it mounted.
        run("umount", place)
    with open(disk, "wb") as file:
        file.truncate(size)
    run(f"mkfs.{file_system}", "-q", disk)
    run("mount", "-o", "loop", disk, place)
    try:
        yield place
    finally:
        run("umount", place)
        os.unlink(disk)
        os.rmdir(place)
