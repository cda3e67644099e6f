#!/usr/bin/env python3
"""The images that must convert. See make.sh; `refuse.py` makes the ones that must not."""

import subprocess
import sys
import tempfile
import pathlib

import refuse
from fixture_set import FixtureSet
from qcow2_builder import (
    EXT_BITMAPS, Qcow2, deflate, deflate_stored, extension, feature_names, noise, sectors, zstd)

K = 1024
M = K * K


def typical(**options):
    """Data, a hole, data, a hole; the image every plain feature is shown on."""
    bits = options.pop("cluster_bits", 16)
    clusters = options.pop("clusters", 6)
    image = Qcow2(clusters << bits, cluster_bits=bits, **options)
    return image.data(0).data(2).data(clusters - 1)


def raw_images(out):
    for length in (0, 1, 511, 512, 513, 4097):
        out.good(f"raw-{length}.raw", noise("raw", length), noise("raw", length),
                 f"{length} bytes of noise; a disk is padded to whole sectors", format="raw")
    holes = bytearray(M)
    for at, length in ((0, 512), (65536, 4096), (200704, 513), (M - 1024, 1024)):
        holes[at : at + length] = sectors("holes", at // 512, length // 512 + 1)[:length]
    out.good("raw-holes.raw", holes, holes, "1 MiB with four islands of data", format="raw")
    inner = typical(cluster_bits=9)
    inner_file = bytes(inner.build()) + sectors("after", 0, 3)
    out.good("raw-with-qcow2-header.raw", inner_file, inner_file, format="raw", probe=False,
             made="a raw disk whose guest wrote a whole qcow2 image to it: only -f says it is raw")
    shift = b"\0" * 512 + inner_file
    out.good("raw-with-late-qcow2-header.raw", shift, shift,
             "the same one sector later: nothing to probe", format="raw")


def plain_images(out):
    for version in (2, 3):
        for bits in (9, 10, 12, 14, 16, 21):
            image = typical(version=version, cluster_bits=bits)
            out.good(f"v{version}-cluster-{1 << bits}.qcow2", image.build(), image.content(),
                     f"version {version}, clusters of {1 << bits} bytes; data, holes, data",
                     clean=True)
    # 64 entries fit an L2 table of 512 bytes: this disk needs several, some of them missing.
    image = Qcow2(300 * 512, cluster_bits=9)
    for index in (0, 1, 63, 64, 65, 191, 299):
        image.data(index)
    out.good("many-l2-tables.qcow2", image.build(), image.content(),
             "five L2 tables' worth of disk, one table missing", clean=True)
    for name, size in (("0", 0), ("512", 512), ("65024", 65024), ("66048", 66048)):
        image = Qcow2(size)
        for index in range(-(-size // 65536)):
            image.data(index, sectors("odd", index * 128, 128))
        out.good(f"size-{name}.qcow2", image.build(), image.content(),
                 f"virtual size {size}, clusters of 64 KiB", clean=size > 0)
    image = typical(reverse=True, clusters=9, cluster_bits=12).data(3).data(4).data(5)
    out.good("reverse-order.qcow2", image.build(), image.content(),
             "data clusters in reverse order in the file", clean=True)
    image = typical(l1_extra=5, cluster_bits=12)
    out.good("l1-larger-than-needed.qcow2", image.build(), image.content(),
             "five L1 entries more than the size needs", clean=True)
    image = Qcow2(4 * M)
    data = image.build()
    out.good("l1-at-end-of-file.qcow2", data[: image.l1_at + 8], image.content(),
             "an empty disk; the file ends right after the L1 table, as qemu-img creates it")
    image = typical(cluster_bits=12)
    data = image.build()
    content = bytearray(image.content())
    content[5 * 4096 + 1024 : 6 * 4096] = bytes(3072)
    out.good("data-cut-inside-cluster.qcow2", data[: image.host[5] + 1024], content,
             "the file ends inside the last data cluster: the rest reads as zeros")
    out.refused("data-beyond-end.qcow2", data[: image.host[5]],
                "the file ends before the last data cluster (qemu-img: zeros)",
                "data cluster of guest offset 20480")
    image = typical(clusters=8).data(4, bytes(65536)).data(5, sectors("half", 0, 64) + bytes(32768))
    out.good("data-is-a-hole.qcow2", image.build(), image.content(),
             "allocated clusters that are zeros, wholly and half (unpack with holes)", clean=True)
    for order in range(7):
        image = typical(refcount_order=order, cluster_bits=12)
        out.good(f"refcount-width-{1 << order}.qcow2", image.build(), image.content(),
                 f"refcounts {1 << order} bits wide", clean=True)


def zero_images(out):
    for bits in (9, 16):
        image = typical(cluster_bits=bits).zero(1).zero(2).zero(3, allocated=True)
        out.good(f"zero-clusters-{1 << bits}.qcow2", image.build(), image.content(),
                 "zero clusters, plain and preallocated over garbage", clean=True)
    below = sectors("b24", 0, 48)
    out.write("below-24k.raw", below)
    image = Qcow2(6 * 4096, 12, below=below, backing="below-24k.raw", backing_format="raw")
    image.zero(1).zero(3, allocated=True).data(4)
    out.good("zero-over-backing.qcow2", image.build(), image.content(),
             "zero clusters that hide a backing file", clean=True)


def compressed_images(out):
    for version, bits in ((2, 16), (3, 9), (3, 12), (3, 16), (3, 21)):
        image = Qcow2(4 << bits, bits, version)
        image.compressed(0).compressed(1, bytes(1 << bits)).data(2)
        mixed = noise("mixed", min(1 << bits - 1, 8192)) + sectors("mixed", 0, 1 << bits - 9)
        image.compressed(3, mixed[: 1 << bits])
        out.good(f"deflate-v{version}-{1 << bits}.qcow2", image.build(), image.content(),
                 "deflate clusters, packed, the last one cut at the exact end of the file",
                 clean=True)
    image = Qcow2(6 * 65536, compression_type=1)
    image.compressed(0).compressed(1, bytes(65536)).data(2).compressed(5, noise("z", 9000))
    out.good("zstd-blocks.qcow2", image.build(), image.content(),
             "zstd clusters of raw and run-length blocks, the last one cut at the end of the file",
             clean=True)
    image = Qcow2(2 * 65536, compression_type=1)
    half = sectors("half", 0, 64)
    image.compressed(0, half + half, zstd(half) + zstd(half)).compressed(1)
    out.good("zstd-two-frames.qcow2", image.build(), image.content(),
             "a cluster stored as two zstd frames", clean=True)
    image = Qcow2(3 * 65536)
    image.compressed(0).data(1)
    longer = sectors("long", 0, 136)
    image.compressed(2, longer[:65536], deflate(longer))
    out.good("deflate-yields-more.qcow2", image.build(), image.content(),
             "a deflate stream of 68 KiB for a cluster of 64 KiB: qemu reads the first 64 KiB",
             clean=True)
    wide = noise("wide", 20 * K)
    wide = (wide + sectors("gap", 0, 16) + wide).ljust(65536, b"w")
    image = Qcow2(2 * 65536).compressed(0, wide, deflate(wide, window=15)).compressed(1)
    out.good("deflate-window-32k.qcow2", image.build(), image.content(),
             "a deflate stream that reaches back 28 KiB (qemu itself writes 4 KiB)", clean=True)
    image = Qcow2(2 * 16384, 14)
    for index in (0, 1):
        content = noise(f"stored{index}", 8192) + sectors("stored", 0, 16)
        # One stored block and the rest deflated: longer than half a cluster, shorter than one.
        image.compressed(index, content, deflate_stored_head(content, 8192))
    out.good("deflate-stored-blocks.qcow2", image.build(), image.content(),
             "deflate streams that begin with a stored block", clean=True)
    content = noise("full", 4096)
    image = Qcow2(2 * 4096, 12)
    image.compressed(0, content, deflate_stored(content)).compressed(1)
    out.good("deflate-longer-than-cluster.qcow2", image.build(), image.content(),
             "a stored deflate stream five bytes longer than the cluster", clean=True)
    image = Qcow2(1 * M).compressed(0).data(1)
    image.compressed(15)
    cut = image.build()
    out.good("deflate-cut-at-end.qcow2", cut, image.content(),
             "the file ends with the last byte of the last stream", clean=True)


def deflate_stored_head(content, head):
    stored = bytearray(deflate_stored(content[:head]))
    stored[0] = 0  # Not the last block: a compressed one follows.
    return bytes(stored) + deflate(content[head:])


def extended_images(out):
    for bits in (14, 16):
        image = Qcow2(8 << bits, bits, extended_l2=True)
        image.data(0).subclusters(1, "d" * 16 + "-" * 16).subclusters(2, "dz-d" * 8)
        image.subclusters(3, "z" * 31 + "-").zero(4).zero(5, allocated=True)
        image.subclusters(7, "-" * 31 + "d")
        out.good(f"extended-l2-{1 << bits}.qcow2", image.build(), image.content(),
                 "subclusters: data, zero, unallocated in every mixture", clean=True)
    below = sectors("base", 0, 6 * 32)
    out.write("below-96k.raw", below)
    image = Qcow2(6 * 16384, 14, extended_l2=True, below=below, backing="below-96k.raw",
                  backing_format="raw")
    image.subclusters(0, "d-z-" * 8).subclusters(1, "z-" * 16).subclusters(2, "-" * 31 + "z")
    image.compressed(3).data(4)
    out.good("extended-l2-backing.qcow2", image.build(), image.content(),
             "subclusters over a raw backing file, and a compressed cluster", clean=True)
    image = Qcow2(4 * 65536, extended_l2=True, compression_type=1)
    image.compressed(0).subclusters(1, "d" + "-" * 31).compressed(3)
    out.good("extended-l2-zstd.qcow2", image.build(), image.content(),
             "extended L2 entries and zstd in one image", clean=True)


def backing_images(out):
    below = sectors("b24", 0, 48)
    for name, clusters, made in (("equal", 6, "as long as"), ("longer", 9, "longer than"),
                                 ("shorter", 3, "shorter than")):
        image = Qcow2(clusters * 4096, 12, below=below, backing="below-24k.raw",
                      backing_format="raw").data(1)
        out.good(f"overlay-{name}.qcow2", image.build(), image.content(),
                 f"an overlay {made} its raw backing file", clean=True)
    odd = sectors("odd", 0, 5)
    out.write("below-2560.raw", odd[:2500])
    image = Qcow2(16384, 12, below=odd[:2500], backing="below-2560.raw", backing_format="raw")
    image.data(2)
    out.good("overlay-of-odd-raw.qcow2", image.build(), image.content(),
             "the backing file ends inside a sector, inside a cluster", clean=True)
    image = Qcow2(6 * 4096, 12, version=2, below=below, backing="below-24k.raw").data(1)
    out.good("overlay-v2-probed.qcow2", image.build(), image.content(),
             "version 2, no backing format: it is probed", clean=True)
    inner = typical(cluster_bits=9)
    inner_file = bytes(inner.build())
    out.write("qcow2-in-raw.raw", inner_file)
    image = Qcow2(16384, 12, below=inner_file, backing="qcow2-in-raw.raw", backing_format="raw")
    image.data(3)
    out.good("overlay-of-header-as-raw.qcow2", image.build(), image.content(),
             "the backing file holds a qcow2 header; the extension says it is raw", clean=True)
    image = Qcow2(16384, 12, below=inner.content(), backing="qcow2-in-raw.raw",
                  backing_format="qcow2").data(3)
    out.good("overlay-of-header-as-qcow2.qcow2", image.build(), image.content(),
             "the same file as a qcow2 backing file", clean=True)
    out.write("chain/base.raw", below)
    mid = Qcow2(5 * 4096, 12, below=below, backing="base.raw", backing_format="raw")
    mid.data(1).compressed(2).zero(3)
    out.write("chain/mid.qcow2", mid.build())
    low = Qcow2(8 * 512, 9, below=mid.content(), backing="mid.qcow2", backing_format="qcow2")
    low.data(1)
    out.write("chain/low.qcow2", low.build())
    top = Qcow2(4 * 16384, 14, extended_l2=True, below=low.content(), backing="chain/low.qcow2",
                backing_format="qcow2").subclusters(0, "--d-z---" + "-" * 24)
    out.good("chain-of-four.qcow2", top.build(), top.content(),
             "raw, qcow2, 512-byte clusters, extended L2; names relative to each overlay's folder",
             clean=True)
    below = typical(cluster_bits=9, clusters=40)
    out.write("below-small-clusters.qcow2", below.build())
    image = Qcow2(6 * 65536, below=below.content(), backing="below-small-clusters.qcow2",
                  backing_format="qcow2").compressed(2)
    out.good("overlay-larger-clusters.qcow2", image.build(), image.content(),
             "clusters of 64 KiB over clusters of 512 bytes, the backing file shorter", clean=True)
    name = "./" * 500 + "below-24k.raw"
    below = sectors("b24", 0, 48)
    image = Qcow2(6 * 4096, 12, below=below, backing=name, backing_format="raw").data(1)
    out.good("overlay-long-name.qcow2", image.build(), image.content(),
             f"a backing name of {len(name)} bytes (1023 are allowed)", clean=True)


def header_images(out):
    unknown = extension(0x12345678, b"an extension of tomorrow") + extension(0x0BADCAFE, b"")
    for name, made, options in (
        ("header-extensions", "unknown extensions, an empty one", dict(extensions=unknown)),
        ("feature-name-table", "a feature name table", dict(extensions=feature_names())),
        ("header-length-104", "version 3 without the compression type", dict(header_length=104)),
        ("header-length-128", "a longer header than today's", dict(header_length=128)),
        ("dirty-bit", "the dirty bit", dict(incompatible=1, compatible=1)),
        ("corrupt-bit", "the corrupt bit", dict(incompatible=2)),
        ("unknown-compatible", "compatible bits nobody knows", dict(compatible=0xF0F0 << 32)),
        ("unknown-autoclear", "autoclear bits nobody knows", dict(autoclear=0xF0F0 << 32)),
        ("lazy-refcounts", "lazy refcounts, not dirty", dict(compatible=1)),
        ("stale-bitmaps", "a bitmap extension that autoclear no longer vouches for",
         dict(extensions=extension(EXT_BITMAPS, b"\xff" * 24))),
    ):
        image = typical(cluster_bits=12, **options)
        out.good(f"{name}.qcow2", image.build(), image.content(), made)
    image = typical(cluster_bits=12, backing="")
    out.good("backing-name-empty.qcow2", image.build(), image.content(),
             "a backing name of no bytes: there is no backing file")
    image = typical(snapshots=("before", "after"), cluster_bits=12)
    out.good("snapshots.qcow2", image.build(), image.content(),
             "two internal snapshots of other content; the active layer counts", clean=True)
    image = typical(bitmaps=True)
    out.good("bitmap.qcow2", image.build(), image.content(), "a persistent dirty bitmap",
             clean=True)


def qemu_images(out):
    """What qemu-img and qemu-io themselves write; the content is played out here beside them."""
    def qemu_io(path, *commands):
        arguments = [piece for command in commands for piece in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "qcow2", *arguments, path], check=True,
                       stdout=subprocess.DEVNULL)

    variants = (
        ("qemu-zlib", "-c", "", 65536), ("qemu-zstd", "-c", "compression_type=zstd", 65536),
        ("qemu-zstd-4k", "-c", "compression_type=zstd,cluster_size=4096", 4096),
        ("qemu-v2", "-q", "compat=0.10", 65536),
        ("qemu-extended", "-q", "extended_l2=on,cluster_size=16384", 16384),
        ("qemu-refcount-1", "-q", "refcount_bits=1,cluster_size=512", 512),
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        disk = bytearray(300 * K)
        disk[: 20 * K] = sectors("start", 0, 40)
        disk[70000:140000] = noise("qemu", 10000) + bytes(range(250)) * 240
        disk[299 * K :] = sectors("end", 0, 2)
        (folder / "disk.raw").write_bytes(disk)
        for name, flag, options, cluster in variants:
            path = str(folder / f"{name}.qcow2")
            option = ["-o", options] if options else []
            subprocess.run(["qemu-img", "convert", flag, "-m", "1", "-f", "raw", "-O", "qcow2",
                            *option, folder / "disk.raw", path], check=True)
            out.good(f"{name}.qcow2", pathlib.Path(path).read_bytes(), disk,
                     f"qemu-img convert {flag} -m 1 -f raw -O qcow2 {' '.join(option)}".strip(),
                     clean=True)
        path = str(folder / "io.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
        commands = ("write -P 1 0 300k", "write -c -P 2 384k 64k", "write -z 64k 64k",
                    "discard 128k 64k", "write -P 3 100k 8k", "write -c -P 4 512k 64k",
                    "write -P 5 390k 1k", "write -z -u 960k 64k")
        qemu_io(path, *commands)
        disk = bytearray(M)
        for at, length, value in ((0, 300, 1), (64, 128, 0), (100, 8, 3), (384, 64, 2),
                                  (512, 64, 4), (390, 1, 5)):
            disk[at * K : (at + length) * K] = bytes([value]) * (length * K)
        out.good("qemu-io.qcow2", pathlib.Path(path).read_bytes(), disk,
                 "qemu-io: " + "; ".join(commands), clean=True)


def main():
    out = FixtureSet(sys.argv[1])
    for make in (raw_images, plain_images, zero_images, compressed_images, extended_images,
                 backing_images, header_images, qemu_images):
        make(out)
    refuse.all_images(out)
    out.manifest()


if __name__ == "__main__":
    main()
