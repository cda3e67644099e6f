"""Builds qcow2 images byte by byte, from a description, without qemu.

The images that a converter must survive are mostly ones that qemu-img will not write: every layout
decision here is therefore explicit, and every header field can be overwritten afterwards. While it
lays out the file, the builder keeps the guest content in a separate bytearray, so the hash in the
manifest owes nothing to any reader of qcow2.

Field names and offsets: qemu docs/interop/qcow2.txt.
"""

import hashlib
import struct
import zlib

MAGIC = b"QFI\xfb"
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

# Header fields: name -> (offset, struct format).
FIELDS = {
    "magic": (0, ">4s"), "version": (4, ">I"), "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"), "cluster_bits": (20, ">I"), "size": (24, ">Q"),
    "crypt_method": (32, ">I"), "l1_size": (36, ">I"), "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"), "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"), "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"), "autoclear": (88, ">Q"), "refcount_order": (96, ">I"),
    "header_length": (100, ">I"), "compression_type": (104, ">B"),
}


def sectors(label, first, count):
    """`count` sectors of 512 bytes which all differ, so that a misplaced one shows."""
    return b"".join(
        (f"{label:>6.6} sector {sector:>8} of a disk\n".encode() * 20)[:512]
        for sector in range(first, first + count)
    )


def noise(seed, length):
    """Incompressible bytes that are the same on every run."""
    return hashlib.shake_128(seed.encode()).digest(length)


def deflate(data, window=12, level=9):
    """One raw deflate stream; qemu writes a window of 4 KiB (12)."""
    coder = zlib.compressobj(level, zlib.DEFLATED, -window)
    return coder.compress(data) + coder.flush()


def deflate_stored(data):
    """Deflate without compression: stored blocks only (RFC 1951, 3.2.4)."""
    out = b""
    pieces = [data[i : i + 65535] for i in range(0, len(data), 65535)]
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        out += struct.pack("<BHH", last, len(piece), len(piece) ^ 0xFFFF) + piece
    return out


def zstd(data, content_size=None):
    """One zstd frame of raw and run-length blocks (RFC 8878, 3.1.1) of 4 KiB each."""
    size = len(data) if content_size is None else content_size
    out = struct.pack("<IBI", 0xFD2FB528, 0b10100000, size)
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)] or [b""]
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        run = len(piece) > 1 and piece == piece[:1] * len(piece)
        header = last | (1 if run else 0) << 1 | len(piece) << 3
        out += struct.pack("<I", header)[:3] + (piece[:1] if run else piece)
    return out


def extension(kind, body):
    return struct.pack(">II", kind, len(body)) + body + bytes(-len(body) % 8)


def feature_names():
    rows = [(0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 3, "compression type"),
            (1, 0, "lazy refcounts"), (2, 0, "bitmaps")]
    return extension(EXT_FEATURE_NAMES, b"".join(
        struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in rows))


class Qcow2:
    """One image. Describe the guest clusters, then call `build()`."""

    def __init__(self, size, cluster_bits=16, version=3, below=b"", backing=None,
                 backing_format=None, extensions=b"", extended_l2=False, refcount_order=4,
                 header_length=112, compression_type=0, l1_extra=0, reverse=False, snapshots=(),
                 bitmaps=False, **fields):
        self.size, self.cluster_bits, self.version = size, cluster_bits, version
        self.cluster = 1 << cluster_bits
        self.backing, self.extended_l2 = backing, extended_l2
        self.refcount_order, self.header_length = refcount_order, header_length
        self.compression_type, self.l1_extra = compression_type, l1_extra
        self.reverse, self.snapshots, self.bitmaps = reverse, list(snapshots), bitmaps
        self.fields = fields
        self.extensions = extensions
        if backing_format:
            self.extensions = extension(EXT_BACKING_FORMAT, backing_format.encode()) + extensions
        self.entries = {}       # guest cluster -> (kind, payload)
        self.compressed_blobs = []
        span = -(-size // self.cluster) * self.cluster
        self.guest = bytearray(span)
        below = below[:size]
        self.guest[: len(below)] = below

    # What the guest clusters hold.

    def _fill(self, index, content):
        start = index * self.cluster
        self.guest[start : start + self.cluster] = content.ljust(self.cluster, b"\0")

    def data(self, index, content=None, host_content=None):
        content = self._default(index) if content is None else content
        self._fill(index, content)
        self.entries[index] = ("data", content if host_content is None else host_content)
        return self

    def zero(self, index, allocated=False):
        self._fill(index, b"")
        self.entries[index] = ("zero", b"\xaa" * self.cluster if allocated else None)
        return self

    def compressed(self, index, content=None, blob=None):
        """`blob` is the stream as stored; `content` what the guest must read from it."""
        content = self._default(index) if content is None else content.ljust(self.cluster, b"\0")
        self._fill(index, content)
        if blob is None:
            blob = zstd(content) if self.compression_type else deflate(content)
        self.compressed_blobs.append(blob)
        self.entries[index] = ("compressed", len(self.compressed_blobs) - 1)
        return self

    def subclusters(self, index, pattern, label="sub"):
        """32 letters: `d` data, `z` reads as zero, `-` unallocated (shows what is below)."""
        assert self.extended_l2 and len(pattern) == 32
        step, start = self.cluster // 32, index * self.cluster
        host, bitmap = bytearray(b"\xaa" * self.cluster), 0
        for number, letter in enumerate(pattern):
            at = number * step
            if letter == "d":
                host[at : at + step] = sectors(label, (start + at) // 512, step // 512)
                self.guest[start + at : start + at + step] = host[at : at + step]
                bitmap |= 1 << number
            elif letter == "z":
                self.guest[start + at : start + at + step] = bytes(step)
                bitmap |= 1 << (32 + number)
        self.entries[index] = ("sub", (bytes(host) if "d" in pattern else None, bitmap))
        return self

    def _default(self, index):
        return sectors(chr(65 + index % 26), index * self.cluster // 512, self.cluster // 512)

    # The file.

    def build(self):
        """Lays the file out: header, refcounts, L1, L2, snapshots, bitmaps, compressed, data."""
        c = self.cluster
        entry_size = 16 if self.extended_l2 else 8
        per_l2 = c // entry_size
        l1_size = -(-len(self.guest) // (c * per_l2)) + self.l1_extra
        l2_numbers = sorted({index // per_l2 for index in self.entries})
        plain = [i for i, (kind, load) in sorted(self.entries.items())
                 if kind in ("data", "zero") and load is not None or kind == "sub" and load[0]]
        if self.reverse:
            plain.reverse()
        packed = b"".join(self.compressed_blobs)
        l1_clusters = max(1, -(-l1_size * 8 // c))
        # An internal snapshot owns an L1 table and an L2 table that point at its own data clusters.
        extra = 3 * len(self.snapshots) + (1 if self.snapshots else 0) + (3 if self.bitmaps else 0)
        fixed = 1 + l1_clusters + len(l2_numbers) + extra + len(plain) + -(-len(packed) // c)
        per_block = c * 8 >> self.refcount_order
        blocks, table_clusters = 1, 1
        while blocks * per_block < fixed + blocks + table_clusters:
            blocks += 1
            table_clusters = -(-blocks * 8 // c)
        cursor = 1
        self.table_at, cursor = cursor * c, cursor + table_clusters
        block_at, cursor = cursor * c, cursor + blocks
        self.l1_at, cursor = cursor * c, cursor + l1_clusters
        self.l2_at = {}
        for number in l2_numbers:
            self.l2_at[number], cursor = cursor * c, cursor + 1
        extra_at, cursor = cursor * c, cursor + extra
        self.host = {}
        for index in plain:
            self.host[index], cursor = cursor * c, cursor + 1
        self.packed_at = cursor * c
        self.end = cursor * c + len(packed) if packed else cursor * c
        out = bytearray(self.end)
        refcounts = [1] * cursor + [0] * -(-len(packed) // c)

        for index in plain:
            load = self.entries[index][1]
            load = load[0] if self.entries[index][0] == "sub" else load
            out[self.host[index] : self.host[index] + c] = load[:c].ljust(c, b"\0")
        out[self.packed_at : self.packed_at + len(packed)] = packed
        self.entry_at = {}
        starts = [0]
        for blob in self.compressed_blobs:
            starts.append(starts[-1] + len(blob))
        for index, (kind, load) in self.entries.items():
            word, bitmap = 0, 0
            if kind == "compressed":
                at, length = self.packed_at + starts[load], len(self.compressed_blobs[load])
                shift = 62 - (self.cluster_bits - 8)
                word = COMPRESSED | at | ((at + length - 1) // 512 - at // 512) << shift
                for host in range(at // c, (at + length - 1) // c + 1):
                    refcounts[host] += 1
            elif index in self.host:
                word = COPIED | self.host[index]
            if kind == "zero" and not self.extended_l2:
                word |= ZERO
            if self.extended_l2:
                bitmap = {"data": 0xFFFFFFFF, "zero": 0xFFFFFFFF << 32, "compressed": 0}.get(kind)
                bitmap = load[1] if kind == "sub" else bitmap
            at = self.l2_at[index // per_l2] + index % per_l2 * entry_size
            self.entry_at[index] = at
            struct.pack_into(">Q", out, at, word)
            if self.extended_l2:
                struct.pack_into(">Q", out, at + 8, bitmap)
        for number, at in self.l2_at.items():
            struct.pack_into(">Q", out, self.l1_at + number * 8, COPIED | at)

        self._write_snapshots(out, extra_at)
        tail = self._write_bitmaps(out, extra_at + (extra - 3) * c) if self.bitmaps else b""
        self._write_refcounts(out, refcounts, block_at, blocks)
        self._write_header(out, l1_size, table_clusters, tail)
        return out

    def _write_snapshots(self, out, at):
        """Each snapshot: one guest cluster (number 0) with content of its own, and its tables."""
        if not self.snapshots:
            return
        c, table = self.cluster, b""
        for number, label in enumerate(self.snapshots):
            l1 = at + c * (1 + 3 * number)
            struct.pack_into(">Q", out, l1, COPIED | l1 + c)
            struct.pack_into(">Q", out, l1 + c, COPIED | l1 + 2 * c)
            out[l1 + 2 * c : l1 + 3 * c] = sectors(label, 0, c // 512)
            name, ident = label.encode(), str(number + 1).encode()
            table += struct.pack(">QIHHIIQII", l1, 1, len(ident), len(name), 1700000000 + number, 0,
                                 0, 0, 16) + struct.pack(">QQ", 0, self.size) + ident + name
            table += bytes(-len(table) % 8)
        out[at : at + len(table)] = table
        self.fields.setdefault("nb_snapshots", len(self.snapshots))
        self.fields.setdefault("snapshots_offset", at)

    def _write_bitmaps(self, out, at):
        """One persistent dirty bitmap: directory, table, one cluster of bits."""
        c, name = self.cluster, b"since-backup"
        entry = struct.pack(">QIIBBHI", at + c, 1, 0, 1, 16, len(name), 0) + name
        entry += bytes(-len(entry) % 8)
        out[at : at + len(entry)] = entry
        struct.pack_into(">Q", out, at + c, at + 2 * c)
        out[at + 2 * c] = 0x05
        self.fields.setdefault("autoclear", 1)
        return extension(EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, len(entry), at))

    def _write_refcounts(self, out, refcounts, block_at, blocks):
        bits = 1 << self.refcount_order
        per_block = self.cluster * 8 // bits
        for number in range(blocks):
            set_word(out, self.table_at + 8 * number, block_at + number * self.cluster)
        for cluster, count in enumerate(refcounts):
            count = min(count, (1 << bits) - 1)
            base = block_at + cluster // per_block * self.cluster
            slot = cluster % per_block
            if bits >= 8:
                width = bits // 8
                out[base + slot * width : base + (slot + 1) * width] = count.to_bytes(width, "big")
            else:
                # Below a byte the entries fill each byte from its least significant bit.
                out[base + slot * bits // 8] |= count << slot * bits % 8

    def _write_header(self, out, l1_size, table_clusters, tail):
        v3 = self.version >= 3
        incompatible = bool(self.compression_type) << 3 | bool(self.extended_l2) << 4
        values = {
            "magic": MAGIC, "version": self.version, "cluster_bits": self.cluster_bits,
            "size": self.size, "l1_size": l1_size, "l1_table_offset": self.l1_at,
            "refcount_table_offset": self.table_at, "refcount_table_clusters": table_clusters,
        }
        if v3:
            values.update(incompatible=incompatible, refcount_order=self.refcount_order,
                          header_length=self.header_length)
            if self.header_length > 104:
                values["compression_type"] = self.compression_type
        length = self.header_length if v3 else 72
        extensions = self.extensions + tail
        out[length : length + len(extensions)] = extensions
        end = length + len(extensions) + 8
        if self.backing is not None:
            name = self.backing if isinstance(self.backing, bytes) else self.backing.encode()
            out[end : end + len(name)] = name
            values.update(backing_file_offset=end, backing_file_size=len(name))
        values.update(self.fields)
        for name, value in values.items():
            set_field(out, name, value)

    def content(self):
        """The guest content, as long as the virtual disk."""
        return bytes(self.guest[: self.size])


def set_field(out, name, value):
    at, layout = FIELDS[name]
    struct.pack_into(layout, out, at, value)
    return out


def set_word(out, at, value):
    struct.pack_into(">Q", out, at, value)
    return out


def get_word(out, at):
    return struct.unpack_from(">Q", out, at)[0]
