"""Random conversions, `sequences.py --conversions`: every kind of source into every kind of target,
new ones and existing ones (`-n`).
"""

import os

from sequence_images import LUKS, MIB, Writes, new_image, option_words, random_options
from sequence_model import SECRET, Bitmap, Image
from sequence_operations import Operation

FORMATS = ["raw", "qcow2", "qcow2", "qcow2", "luks"]


class Conversions:
    """Converts one random source several times."""

    def __init__(self, sequence):
        self.sequence, self.random = sequence, sequence.random

    def play(self):
        random = self.random
        base = None
        for number in range(random.choice([0, 0, 1, 1, 2])):
            base = self.sequence.new_base(f"start{number}", number == 0, base)
        format = "qcow2" if base else random.choice(FORMATS)
        self.source = self._image("disk", format, base, None)
        for number in range(4):
            if random.random() < 0.6:
                self._convert_to_new(f"new{number}")
            else:
                self._convert_to_existing(f"old{number}")
            for name in os.listdir(self.sequence.folder):
                if name.startswith(("new", "old")):
                    os.remove(self.sequence.place(name))

    def _image(self, name, format, base, size):
        """An image with data, and perhaps snapshots and bitmaps."""
        sequence, random = self.sequence, self.random
        while True:
            image, words = new_image(random, name, base, format, size)
            if "data_file" in image.options:
                words = [w.replace("data_file=data", f"data_file={name}-data") for w in words]
            if sequence.create(image, words):
                break
        if format == "luks":
            # Sectors that nothing was written to decrypt to noise.
            image.disk = sequence.judge.read(image)
        self._fill(image)
        if format == "qcow2" and random.random() < 0.3 and image.options.get("refcount_bits") != 1:
            if sequence.run(["qemu-img", "snapshot", "-c", "s", *image.opened]).status == 0:
                image.snapshots["s"] = image.disk.copy()
            self._fill(image)
        if format == "qcow2" and not image.is_version_2 and random.random() < 0.3:
            for bitmap in ["one", "two"][:random.randrange(1, 3)]:
                image.bitmaps[bitmap] = Bitmap(random.choice([512, 4096, 65536, MIB]), True)
                words = ["-g", str(image.bitmaps[bitmap].granularity), *image.named, bitmap]
                sequence.run(["qemu-img", "bitmap", "--add", *words])
            self._fill(image)
        return image

    def _fill(self, image):
        operations = self.sequence.operations
        operations.write_by_qemu(
            Writes(self.random, image).add(self.random.randrange(1, 8)), image)
        if image.format == "qcow2" and self.random.random() < 0.4:
            operations.write_compressed(image)

    def _words(self):
        """Options that change how, not what, is copied."""
        random = self.random
        words = ["convert", *random.choice([[], ["-W"], ["-m", "1"], ["-m", "16", "-W"]])]
        if random.random() < 0.2:
            words += ["-S", random.choice(["0", "512", "64k", "1M"])]
        if random.random() < 0.15:
            words += ["-t", random.choice(["none", "writethrough", "directsync"])]
        if random.random() < 0.15:
            words += ["-T", random.choice(["none", "directsync"])]
        return words

    def _snapshot(self):
        """The disk to convert, and the option that names a snapshot."""
        source = self.source
        if source.snapshots and self.random.random() < 0.4:
            name = self.random.choice(list(source.snapshots))
            return self.sequence.judge.read(source, name), ["-l", f"snapshot.name={name}"]
        return source.disk, []

    def _convert_to_new(self, name):
        random, source = self.random, self.source
        format = random.choice(FORMATS)
        disk, words = self._snapshot()
        words = self._words() + words + ["-O", format]
        target = Image(name, format, disk, options=LUKS if format == "luks" else {})
        if format == "qcow2":
            options = random_options(random)
            options = {k: v for k, v in options.items() if k != "data_file"}
            if random.random() < 0.15:
                options["data_file"] = f"{name}-data"
            else:
                options.pop("data_file_raw", None)
            words += self._backing(target, options)
            target = Image(name, format, disk, target.backing, options)
            words += ["-c"] if random.random() < 0.3 else []
            if random.random() < 0.4 and source.format == "qcow2":
                words += ["--bitmaps"]
                target.bitmaps = dict(source.bitmaps)
        words += option_words(target.options) if target.options else []
        self._perform(target, words, is_new=True)

    def _backing(self, target, options):
        """The words for a backing file that the target may share with the source."""
        source = self.source
        if not source.backing or self.random.random() < 0.6:
            return []
        base = self.sequence.images[source.backing]
        target.backing = base.name
        options.pop("preallocation", None)
        options.pop("data_file_raw", None)
        return ["-B", base.name, "-F", base.format]

    def _convert_to_existing(self, name):
        random, source = self.random, self.source
        disk, words = self._snapshot()
        size = disk.size + random.choice([0, 0, 512, 70 * 512, MIB, -512])
        base = None
        format = random.choice(FORMATS)
        if format == "qcow2" and random.random() < 0.4:
            base = self.sequence.new_base(f"{name}-base", True)
        target = self._image(name, format, base, max(size, 512))
        words = self._words() + words + ["-n"]
        words += ["-c"] if format == "qcow2" and random.random() < 0.15 else []
        if not target.is_encrypted:
            words += ["-O", format]
        self._perform(target, words, is_new=False, disk=disk)

    def _perform(self, target, words, is_new, disk=None):
        source = self.source
        words += source.named if not source.is_encrypted or "--object" not in words else (
            ["--image-opts", source.description])
        if not is_new and target.is_encrypted:
            words += [] if "--object" in words else SECRET
            words += ["--target-image-opts", target.description]
        else:
            words += [target.name]

        def change(_):
            if disk:
                before = target.disk.copy()
                target.disk.put(disk, 0, disk.size)
                target.record_change(before)
            self.sequence.judge.compare(target)
        makes_key = is_new and target.is_encrypted
        self.sequence.perform(Operation(words, change, is_for_swimg=True,
                                        is_like_qemu=is_new or "-c" not in words,
                                        qemu_has_it=not makes_key or self.random.random() < 0.1))
