"""The images that must be refused: one line on standard error, exit 1, no target.

`says` is a piece of that line, compared without regard to case. Where qemu-img 7.2 converts such an
image to something silently, the description says so.
"""

import struct

from fixture_set import pack_fields
from qcow2_builder import (
    COPIED, EXT_BACKING_FORMAT, EXT_CRYPTO, EXT_DATA_FILE, Qcow2, deflate, deflate_stored,
    extension, get_word, noise, sectors, set_field, set_word, zstd)

BITS = 12
CLUSTER = 1 << BITS


def small(**options):
    return Qcow2(4 * CLUSTER, BITS, **options).data(0).data(3)


def all_images(out):
    for make in (headers, tables, clusters, codecs, subclusters, backing, other_formats):
        make(out)


def headers(out):
    for name, made, says, fields in (
        ("incompatible-5", "incompatible feature bit 5", "incompatible", dict(incompatible=1 << 5)),
        ("incompatible-63", "incompatible feature bit 63", "incompatible",
         dict(incompatible=1 << 63)),
        ("encrypted-aes", "crypt_method 1", "encrypt", dict(crypt_method=1)),
        ("encrypted-no-header", "crypt_method 2 without its header extension", "encrypt",
         dict(crypt_method=2)),
        ("encrypted-luks", "crypt_method 2 with its header extension", "encrypt",
         dict(crypt_method=2,
              extensions=extension(EXT_CRYPTO, struct.pack(">QQ", 8 * CLUSTER, CLUSTER)))),
        ("encrypted-unknown", "crypt_method 3", "encrypt", dict(crypt_method=3)),
        ("external-data-file", "an external data file", "data file",
         dict(incompatible=1 << 2, extensions=extension(EXT_DATA_FILE, b"below-24k.raw"))),
        ("version-4", "version 4", "version", dict(version_field=4)),
        ("cluster-bits-0", "cluster_bits 0", "cluster", dict(cluster_bits_field=0)),
        ("cluster-bits-8", "cluster_bits 8", "cluster", dict(cluster_bits_field=8)),
        ("cluster-bits-22", "cluster_bits 22", "cluster", dict(cluster_bits_field=22)),
        ("cluster-bits-64", "cluster_bits 64", "cluster", dict(cluster_bits_field=64)),
        ("cluster-bits-max", "cluster_bits 2^32 - 1", "cluster",
         dict(cluster_bits_field=(1 << 32) - 1)),
        ("refcount-order-7", "refcounts of 128 bits", "refcount", dict(refcount_order_field=7)),
        ("header-length-72", "version 3 with a version 2 header length", "header",
         dict(header_length_field=72)),
        ("header-length-max", "a header longer than the cluster", "header",
         dict(header_length_field=(1 << 32) - 8)),
        ("compression-type-2", "an unknown compression type", "compression",
         dict(compression_type=2, incompatible=1 << 3)),
        ("zstd-without-bit", "compression type zstd, its incompatible bit clear", "compression",
         dict(compression_type=1, incompatible=0)),
        ("zstd-short-header", "the compression type bit, the header too short to hold a type",
         "compression", dict(header_length=104, incompatible=1 << 3)),
        ("extended-l2-small-clusters", "extended L2 entries with clusters below 16 KiB", "cluster",
         dict(incompatible=1 << 4)),
        ("l1-too-large", "2^31 - 1 L1 entries", "L1", dict(l1_size=(1 << 31) - 1)),
        ("l1-over-32-mib", "an L1 table of more than 32 MiB", "L1", dict(l1_size=(4 << 20) + 1)),
        ("l1-too-small", "fewer L1 entries than the virtual size needs", "L1", dict(l1_size=0)),
        ("l1-unaligned", "the L1 table off a cluster boundary", "L1",
         dict(l1_table_offset=CLUSTER + 512)),
        ("l1-negative", "the L1 table at 2^63", "L1", dict(l1_table_offset=1 << 63)),
        ("l1-beyond-end", "the L1 table beyond the end (qemu-img: an empty disk)", "L1",
         dict(l1_table_offset=1 << 40)),
        ("size-huge", "virtual size 2^62, the tables far beyond the end", "",
         dict(size_field=1 << 62, l1_size=4 << 20, l1_table_offset=1 << 40)),
        ("size-negative", "virtual size 2^64 - 512", "", dict(size_field=(1 << 64) - 512)),
    ):
        late = {key[:-6]: fields.pop(key) for key in list(fields) if key.endswith("_field")}
        data = small(**fields).build()
        for key, value in late.items():
            set_field(data, key, value)
        out.refused(f"bad-{name}.qcow2", data, made, says)
    for version, made in ((0, "version 0"), (1, "version 1 (the qcow format)")):
        out.refused(f"bad-version-{version}.qcow2", set_field(small().build(), "version", version),
                    made, "version" if version == 0 else "", probe=version == 1)
    out.refused("bad-magic.qcow2", set_field(small().build(), "magic", b"QFI\xfa"),
                "one bit of the magic wrong, read with -f qcow2", "qcow2", probe=False)
    out.refused("bad-empty.qcow2", b"", "an empty file, read with -f qcow2", "qcow2", probe=False)
    out.refused("bad-header-cut.qcow2", small().build()[:60], "the file ends inside the header", "")
    overrun = small(extensions=struct.pack(">II", 0x12345678, CLUSTER) + b"too short")
    out.refused("bad-extension-overrun.qcow2", overrun.build(),
                "a header extension longer than its cluster", "extension")
    overrun = small(extensions=struct.pack(">II", 0x12345678, (1 << 32) - 4))
    out.refused("bad-extension-wraps.qcow2", overrun.build(),
                "a header extension whose padded length wraps at 32 bits", "extension")


def tables(out):
    def change(name, made, says, edit, image=None, cut=None):
        image = image or small()
        data = image.build()
        edit(image, data)
        out.refused(f"bad-{name}.qcow2", data if cut is None else data[: cut(image)], made, says)

    def nothing(image, data):
        pass

    change("l1-cut", "the file ends inside the L1 table (qemu-img: an empty disk)", "L1", nothing,
           Qcow2(600 * CLUSTER, BITS).data(599), lambda image: image.l1_at + 8)
    change("l2-cut", "the file ends inside an L2 table (qemu-img: holes)", "L2", nothing,
           cut=lambda image: image.l2_at[0] + 16)
    change("l2-beyond-end", "an L2 table beyond the end (qemu-img: holes)", "L2",
           lambda image, data: set_word(data, image.l1_at, COPIED | 1 << 40))
    change("l2-unaligned", "an L2 table off a cluster boundary", "L2",
           lambda image, data: set_word(data, image.l1_at, COPIED | image.l2_at[0] + 512))
    change("l1-reserved-low", "a reserved low bit in an L1 entry", "L1",
           lambda image, data: set_word(data, image.l1_at, get_word(data, image.l1_at) | 2))
    change("l1-reserved-high", "a reserved high bit in an L1 entry", "L1",
           lambda image, data: set_word(data, image.l1_at, get_word(data, image.l1_at) | 1 << 60))


def clusters(out):
    def change(name, made, says, word, image=None):
        image = image or small()
        data = image.build()
        set_word(data, image.entry_at[3], word(get_word(data, image.entry_at[3])))
        out.refused(f"bad-{name}.qcow2", data, made, says)

    change("data-unaligned", "a data cluster off a cluster boundary", "align", lambda w: w + 512)
    change("l2-reserved-low", "a reserved low bit in an L2 entry", "L2", lambda w: w | 4)
    change("l2-reserved-high", "a reserved high bit in an L2 entry", "L2", lambda w: w | 1 << 58)
    change("v2-zero-flag", "a zero cluster in version 2, where the bit is reserved", "",
           lambda w: 1, small(version=2))
    change("v2-zero-allocated", "a preallocated zero cluster in version 2", "",
           lambda w: w | 1, small(version=2))
    change("zero-unaligned", "a preallocated zero cluster off a cluster boundary", "align",
           lambda w: (w + 512) | 1)


def codecs(out):
    def one(name, made, content, blob, says="", cut=0, **options):
        image = Qcow2(4 * CLUSTER, BITS, **options).data(0).compressed(3, content, blob)
        data = image.build()
        out.refused(f"bad-{name}.qcow2", data[: len(data) - cut], made, says or "compress")

    content = sectors("codec", 0, CLUSTER // 512)
    one("deflate-garbage", "noise where a deflate stream should be", content, b"\xff" * 900)
    one("deflate-short", "a deflate stream that yields less than the cluster", content,
        deflate(content[:-1]))
    mixed = noise("mixed", CLUSTER // 2) + bytes(CLUSTER // 2)
    one("deflate-truncated", "the file ends inside a deflate stream", mixed, None, cut=700)
    stored = noise("stored", CLUSTER)
    one("deflate-stored-truncated", "the file ends inside a stored block (qemu-img: zeros for the "
        "rest)", stored, deflate_stored(stored), cut=900)
    zstandard = dict(compression_type=1)
    one("zstd-garbage", "noise where a zstd frame should be", content, b"\xff" * 900, **zstandard)
    one("zstd-short", "a zstd frame that yields less than the cluster", content,
        zstd(content[:-512]), **zstandard)
    one("zstd-more", "a zstd frame that yields more than the cluster", content,
        zstd(content + b"x"), **zstandard)
    one("zstd-truncated", "the file ends inside a zstd frame (qemu-img: zeros for the rest)",
        mixed, zstd(mixed), cut=900, **zstandard)
    one("zstd-is-deflate", "a deflate stream where the header says zstd", content,
        deflate(content), **zstandard)
    one("deflate-is-zstd", "a zstd frame where the header says deflate", content, zstd(content))
    image = Qcow2(4 * CLUSTER, BITS).data(0).compressed(3)
    data = image.build()
    set_word(data, image.entry_at[3], get_word(data, image.entry_at[3]) + (1 << 40))
    out.refused("bad-compressed-beyond-end.qcow2", data, "a compressed cluster beyond the end",
                "compress")


def subclusters(out):
    def change(name, made, word, bitmap):
        image = Qcow2(4 << 14, 14, extended_l2=True).data(0).subclusters(2, "d-" * 16).compressed(3)
        data = image.build()
        at = image.entry_at[3 if word == "compressed" else 2]
        if word == 0:
            set_word(data, at, 0)
        set_word(data, at + 8, bitmap)
        out.refused(f"bad-{name}.qcow2", data, made, "")

    change("subcluster-both", "a subcluster both allocated and zero", None, 1 << 32 | 1)
    change("subcluster-no-host", "an allocated subcluster without a host cluster", 0, 1)
    change("subcluster-compressed", "a compressed cluster with subclusters", "compressed", 1)


def backing(out):
    def overlay(name, made, says="backing", target=None, backing_format=None, **options):
        image = Qcow2(4 * CLUSTER, BITS, backing=target, backing_format=backing_format, **options)
        out.refused(f"bad-{name}.qcow2", image.data(0).build(), made, says)

    overlay("backing-missing", "the backing file is missing", says="no-such-file.raw",
            target="no-such-file.raw", backing_format="raw")
    overlay("backing-missing-escapes", "a backing name with terminal escapes and a line break",
            target=b"\x1b[31mred\x07\r\nswimg: second line\xff\x9b", backing_format="raw")
    overlay("backing-fifo", "the backing file is a FIFO (qemu-img hangs)", says="a-fifo",
            target="a-fifo", backing_format="raw")
    overlay("backing-folder", "the backing file is a folder", says="chain", target="chain",
            backing_format="raw")
    overlay("backing-json", "a json: backing name", target='json:{"driver":"raw","file.filename":'
            '"below-24k.raw"}', backing_format="raw")
    overlay("backing-nbd", "an nbd: backing name", target="nbd:localhost:1", backing_format="raw")
    overlay("backing-nbd-url", "an nbd:// backing name", target="nbd://localhost:1/x",
            backing_format="raw")
    overlay("backing-http", "an http:// backing name", target="http://localhost:1/x")
    overlay("backing-self", "an image that is its own backing file",
            target="bad-backing-self.qcow2", backing_format="qcow2")
    for one, other in (("a", "b"), ("b", "a")):
        overlay(f"backing-loop-{one}", "two images that are each other's backing file",
                target=f"bad-backing-loop-{other}.qcow2", backing_format="qcow2")
    overlay("backing-format-unknown", "a backing format that does not exist", "nosuch",
            target="below-24k.raw", backing_format="nosuch")
    overlay("backing-format-vmdk", "a backing format not supported", "vmdk", target="below-24k.raw",
            backing_format="vmdk")
    overlay("backing-format-long", "a backing format name of 40 bytes", "backing",
            target="below-24k.raw", extensions=extension(EXT_BACKING_FORMAT, b"raw" + b"x" * 37))
    overlay("backing-not-qcow2", "a raw backing file said to be qcow2", "qcow2",
            target="below-24k.raw", backing_format="qcow2")
    overlay("backing-broken", "the backing file is a broken image", "L2", target="bad-l2-cut.qcow2",
            backing_format="qcow2")
    overlay("backing-name-long", "a backing name of 1024 bytes", target="./" * 505 + "b" * 14,
            backing_format="raw")
    overlay("backing-name-huge", "a backing name of 2^32 - 1 bytes", target="below-24k.raw",
            backing_file_size=(1 << 32) - 1)
    overlay("backing-name-past-cluster", "a backing name that leaves the first cluster",
            target="below-24k.raw", backing_file_offset=CLUSTER - 4)
    overlay("backing-name-far", "a backing name at 2^62", target="below-24k.raw",
            backing_file_offset=1 << 62)


def other_formats(out):
    """Headers of formats that are not there: probing must name them, never read them as raw."""
    vdi = pack_fields(4096, (0, "40s", b"<<< Oracle VM VirtualBox Disk Image >>>\n"),
                      (0x40, "<I", 0xBEDA107F), (0x44, "<I", 0x00010001))
    for name, magic in (
        ("qcow", pack_fields(4096, (0, ">4sI", b"QFI\xfb", 1))),
        ("vmdk", pack_fields(4096, (0, "<4sI", b"KDMV", 1))),
        ("vmdk3", pack_fields(4096, (0, "<4sI", b"COWD", 1))),
        ("vmdk-text", b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\n" + bytes(467)),
        ("vhdx", pack_fields(4096, (0, "8s", b"vhdxfile"))),
        ("vpc", pack_fields(4096, (0, "8s", b"conectix"))),
        ("vdi", vdi),
        ("qed", pack_fields(4096, (0, "<4sI", b"QED\0", 65536))),
        ("luks", pack_fields(4096, (0, ">6sH", b"LUKS\xba\xbe", 1))),
        ("parallels", pack_fields(4096, (0, "<16sI", b"WithoutFreeSpace", 2))),
    ):
        says = name.split("-")[0].rstrip("3")
        out.refused(f"probe-{name}.img", magic, f"begins like a {says} image; nothing tells -f",
                    says, format=None)
