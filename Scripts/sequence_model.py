"""What images should hold, as values, and reading images by qemu's programs.

Used by sequences.py. Offsets and sizes are bytes.
"""

import json
import os

PAGE = 1 << 16
SECRET = ["--object", "secret,id=s,data=correct horse"]


def data_extents(file, size):
    """The ranges of an open file that are no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


class Disk:
    """A disk as pages of 64 KiB; pages of zeros are left out."""

    def __init__(self, size):
        self.size = size
        # The part from the start on that the model knows.
        self.known = size
        self.pages = {}

    def copy(self):
        result = Disk(self.size)
        result.known = self.known
        result.pages = dict(self.pages)
        return result

    @staticmethod
    def of_file(path):
        """The disk that a raw file holds."""
        result = Disk(os.path.getsize(path))
        with open(path, "rb", buffering=0) as file:
            for start, end in data_extents(file.fileno(), result.size):
                for index in range(start // PAGE, -(-end // PAGE)):
                    result._put(index, os.pread(file.fileno(), PAGE, index * PAGE))
        return result

    def _put(self, index, data):
        if data.count(0) == len(data):
            self.pages.pop(index, None)
        else:
            self.pages[index] = bytes(data).ljust(PAGE, b"\0")

    def page(self, index):
        return self.pages.get(index, bytes(PAGE))

    def write(self, offset, data):
        at = 0
        while at < len(data):
            index, start = divmod(offset + at, PAGE)
            length = min(PAGE - start, len(data) - at)
            page = bytearray(self.page(index))
            page[start:start + length] = data[at:at + length]
            self._put(index, page)
            at += length

    def put(self, other, start, end):
        """Takes the range from another disk, and zeros behind its end."""
        for index in range(start // PAGE, (end + PAGE - 1) // PAGE):
            if index in self.pages or index in other.pages:
                low, high = max(start, index * PAGE), min(end, (index + 1) * PAGE)
                page = other.page(index)[low - index * PAGE:high - index * PAGE]
                self.write(low, page)

    def resize(self, size):
        for index in [i for i in self.pages if (i + 1) * PAGE > size]:
            self._put(index, self.pages[index][:max(0, size - index * PAGE)])
        self.size = self.known = size

    def resized(self, size):
        result = self.copy()
        result.resize(size)
        return result

    def difference(self, other):
        """A line about the first difference; None if there is none."""
        if self.size != other.size:
            return f"{other.size} bytes instead of {self.size}"
        for index in sorted(self.pages.keys() | other.pages.keys()):
            mine, theirs = self.page(index), other.page(index)
            if mine != theirs:
                at = next(i for i in range(PAGE) if mine[i] != theirs[i])
                return f"byte {index * PAGE + at} is {theirs[at]} instead of {mine[at]}"
        return None

    def changed_bits(self, other, granularity):
        """The bits of the pieces of `granularity` bytes that differ from another disk."""
        bits = 0
        for index in self.pages.keys() | other.pages.keys():
            mine, theirs = self.page(index), other.page(index)
            if mine == theirs:
                continue
            step = min(granularity, PAGE)
            for at in range(0, PAGE, step):
                if mine[at:at + step] != theirs[at:at + step]:
                    bits |= 1 << (index * PAGE + at) // granularity
        return bits


class Bitmap:
    """A persistent bitmap; its bits are those of an integer."""

    def __init__(self, granularity, is_enabled):
        self.granularity, self.is_enabled = granularity, is_enabled
        self.bits = 0
        # Whether it was in use when a program died: it can only be removed.
        self.is_broken = False
        # Whether more bits than `bits` may be set, because writes do not have to be minimal.
        self.may_have_more = False

    def record(self, start, end):
        if self.is_enabled and not self.is_broken and end > start:
            self.bits |= span(start // self.granularity, (end - 1) // self.granularity + 1)

    def resize(self, size):
        self.bits &= span(0, -(-size // self.granularity))

    def merge(self, other):
        if other.granularity == self.granularity:
            self.bits |= other.bits
            return
        bits, index = other.bits, 0
        while bits:
            clear = (bits & -bits).bit_length() - 1
            index, bits = index + clear, bits >> clear
            run = (~bits & (bits + 1)).bit_length() - 1
            self.bits |= span(index * other.granularity // self.granularity,
                              ((index + run) * other.granularity - 1) // self.granularity + 1)
            index, bits = index + run, bits >> run


def span(start, end):
    """The bits from start to before end."""
    return ((1 << max(0, end - start)) - 1) << start


class Image:
    """An image file: what it should show, and how to name it in command lines."""

    def __init__(self, name, format, disk, backing=None, options=None):
        self.name, self.format, self.disk, self.backing = name, format, disk, backing
        self.options = options or {}
        self.cluster = int(self.options.get("cluster_size", PAGE))
        self.refcount_bits = self.options.get("refcount_bits", 16)
        self.is_version_2 = self.options.get("compat") == "0.10"
        self.is_encrypted = format == "luks" or "encrypt.format" in self.options
        self.snapshots, self.bitmaps = {}, {}
        # A program has died while it wrote: refcounts may be wrong until the next repair.
        self.is_untidy = self.is_dirty = False
        # The backing file has changed, so that snapshots show something else.
        self.snapshots_have_changed = False

    @property
    def named(self):
        """The words that name it in verbs that know -f."""
        return self.opened if self.is_encrypted else ["-f", self.format, self.name]

    @property
    def opened(self):
        """The words that name it in verbs that do not know -f."""
        return SECRET + ["--image-opts", self.description] if self.is_encrypted else [self.name]

    @property
    def description(self):
        prefix = "" if self.format == "luks" else "encrypt."
        return f"driver={self.format},{prefix}key-secret=s,file.filename={self.name}"

    def record(self, start, end):
        for bitmap in self.bitmaps.values():
            bitmap.record(start, end)

    def record_change(self, before):
        """Writes that a program chose have led to the disk: at least all that changed is set."""
        for bitmap in self.bitmaps.values():
            if bitmap.is_enabled and not bitmap.is_broken:
                bitmap.bits |= self.disk.changed_bits(before, bitmap.granularity)
                bitmap.resize(self.disk.size)
                bitmap.may_have_more = True

    def merge(self, name, other):
        self.bitmaps[name].merge(other)
        self.bitmaps[name].resize(self.disk.size)

    def resize(self, size):
        self.disk.resize(size)
        for bitmap in self.bitmaps.values():
            bitmap.resize(size)


class Finding(Exception):
    """Something is not as it should be."""


class Judge:
    """Compares image files with the model, by qemu-img, qemu-nbd and nbdinfo."""

    def __init__(self, execute):
        # (words, may_fail=False) -> Outcome
        self.execute = execute

    def read(self, image, snapshot=None):
        """The disk, or that of a snapshot."""
        words = ["qemu-img", "convert", "-U", "-O", "raw"]
        if snapshot:
            words += ["-l", f"snapshot.name={snapshot}"]
        path = self.execute([*words, *image.named, "judged"]).place("judged")
        disk = Disk.of_file(path)
        os.remove(path)
        return disk

    def facts(self, image):
        words = ["qemu-img", "info", "-U", "--output=json"]
        return json.loads(self.execute([*words, *image.named]).stdout)

    def compare(self, image, is_thorough=True):
        """Raises a Finding unless the file is as its model.

        - is_thorough: whether to look at snapshots and bitmaps, too. It is done in any case where
          only the file tells what they hold.
        """
        if image.format == "qcow2":
            self._check(image)
        if image.format == "qcow2" and is_thorough:
            self._compare_facts(image)
        difference = image.disk.difference(self.read(image))
        if difference:
            raise Finding(f"{image.name}: {difference}")
        if is_thorough or image.snapshots_have_changed:
            self._compare_snapshots(image)
        if is_thorough or any(bitmap.may_have_more for bitmap in image.bitmaps.values()):
            for name, bitmap in image.bitmaps.items():
                self._compare_bitmap(image, name, bitmap)

    def _compare_snapshots(self, image):
        for name, disk in image.snapshots.items():
            # Behind the end that the disk had, a snapshot shows what its tables and backing file
            # have.
            shown = self.read(image, name)
            if shown.size != image.disk.size:
                raise Finding(f"{image.name}, snapshot {name}: {shown.size} bytes")
            shown.resize(min(disk.known, shown.size))
            if image.snapshots_have_changed:
                disk.put(shown, 0, shown.size)
                disk.known = shown.size
            difference = disk.resized(shown.size).difference(shown)
            if difference:
                raise Finding(f"{image.name}, snapshot {name}: {difference}")
        image.snapshots_have_changed = False

    def _check(self, image):
        if image.is_dirty:
            return
        secret = image.named if image.is_encrypted else ["-f", "qcow2", image.name]
        outcome = self.execute(["qemu-img", "check", "-U", *secret], may_fail=True)
        if outcome.status not in ([0, 3] if image.is_untidy else [0]):
            raise Finding(f"{image.name}: qemu-img check: {outcome.stdout}{outcome.stderr}")

    def _compare_facts(self, image):
        facts = self.facts(image)
        data = facts["format-specific"]["data"]
        snapshots = [snapshot["name"] for snapshot in facts.get("snapshots", [])]
        if snapshots != list(image.snapshots):
            raise Finding(f"{image.name}: snapshots {snapshots} not {list(image.snapshots)}")
        shown = {b["name"]: (b["granularity"], "auto" in b["flags"], "in-use" in b["flags"])
                 for b in data.get("bitmaps", [])}
        due = {name: (b.granularity, b.is_enabled, b.is_broken)
               for name, b in image.bitmaps.items()}
        if shown != due:
            raise Finding(f"{image.name}: bitmaps {shown} instead of {due}")
        if facts.get("backing-filename") != image.backing:
            raise Finding(f"{image.name}: backing file {facts.get('backing-filename')}")
        if data.get("corrupt"):
            raise Finding(f"{image.name}: marked as corrupt")
        if facts.get("dirty-flag", False) != image.is_dirty:
            raise Finding(f"{image.name}: dirty: {not image.is_dirty}")

    def _compare_bitmap(self, image, name, bitmap):
        if bitmap.is_broken:
            return
        bits = self.bits(image, name, bitmap.granularity)
        missing, more = bitmap.bits & ~bits, bits & ~bitmap.bits
        if missing or (more and not bitmap.may_have_more):
            words = [f"{(b & -b).bit_length() * bitmap.granularity - bitmap.granularity} {text}"
                     for b, text in [(missing, "is not set"), (more, "is set")] if b]
            raise Finding(f"{image.name}, bitmap {name}: {', '.join(words)}")
        bitmap.bits, bitmap.may_have_more = bits, False

    def bits(self, image, name, granularity):
        server = ["qemu-nbd", "-r", "-B", name, *image.named]
        words = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", "--", "[", *server, "]"]
        bits = 0
        for extent in json.loads(self.execute(words).stdout):
            if extent["type"] == 1:
                end = extent["offset"] + extent["length"]
                bits |= span(extent["offset"] // granularity, -(-end // granularity))
        return bits
