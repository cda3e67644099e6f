"""The operations of sequences.py: command lines for swimg and qemu-img, and what they do to the
model.
"""

import dataclasses
import os
import typing

from sequence_images import KIB, MIB, Writes, leak, new_image, option_words, random_options
from sequence_model import SECRET, Bitmap, Finding


@dataclasses.dataclass
class Operation:
    """A command that swimg and qemu-img both have."""
    words: list
    # Changes the model once the command has succeeded; gets whether swimg ran it.
    apply: typing.Callable
    # Whether qemu-img is to end as swimg does.
    is_like_qemu: bool = True
    # Whether qemu-img knows it at all.
    qemu_has_it: bool = True
    # Whether all disks and snapshots are to be the same after swimg and after qemu-img.
    has_equal_twin: bool = False
    # Whether swimg has to run it.
    is_for_swimg: bool = False
    # Changes the model after qemu-img has failed and has left something.
    fail: typing.Optional[typing.Callable] = None


class Operations:
    """Draws random operations on the image `disk` of a sequence."""

    def __init__(self, sequence):
        self.sequence, self.random = sequence, sequence.random
        self.serial = 0

    @property
    def image(self):
        return self.sequence.images["disk"]

    def draw(self):
        """Does what only qemu-io does, or returns an operation."""
        image = self.image
        if image.is_dirty or (image.is_untidy and self.random.random() < 0.4):
            # qemu's repair, which comes with each change, loses snapshots beside bitmaps.
            if self.random.random() < 0.7 or (image.snapshots and image.bitmaps):
                return self.check()
        kinds = [(self.write, 7), (self.compressed_write, 1.5), (self.dying_write, 0.7),
                 (self.leak, 0.5), (self.snapshot, 4), (self.resize, 2.5), (self.bitmap, 4.5),
                 (self.rebase, 2), (self.commit, 1.5), (self.amend, 1.5), (self.check, 0.7),
                 (self.convert_into, 2), (self.copy, 2)]
        kind = self.random.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        return kind()

    def name(self, prefix):
        self.serial += 1
        return f"{prefix}{self.serial}"

    def clean_up(self):
        """Removes the images that only one operation needed."""
        for name in os.listdir(self.sequence.folder):
            if name.startswith(("src", "other", "copy")):
                os.remove(self.sequence.place(name))

    # By qemu-io

    def write(self):
        count = self.random.randrange(1, 5)
        self.write_by_qemu(Writes(self.random, self.image).add(count), self.image)

    def write_by_qemu(self, writes, image):
        outcome = self.sequence.run(writes.words)
        if "failed" in outcome.stdout + outcome.stderr or outcome.status != 0:
            raise Finding(f"qemu-io: {outcome.stdout}{outcome.stderr}")
        writes.apply(lambda: self.sequence.judge.read(image))
        # qemu-io has repaired it.
        image.is_dirty = False

    def compressed_write(self):
        self.write_compressed(self.image)

    def write_compressed(self, image):
        """qemu-io refuses it where a cluster is allocated, yet records the write in bitmaps."""
        writes = Writes(self.random, image).add_compressed()
        before = image.disk.copy()
        outcome = self.sequence.run(writes.words)
        writes.apply(lambda: None)
        image.is_dirty = False
        if "failed" in outcome.stdout + outcome.stderr or outcome.status != 0:
            image.disk = before
            self.sequence.take_bitmaps(image)

    def dying_write(self):
        image = self.image
        writes = Writes(self.random, image).add(self.random.randrange(1, 4))
        words = writes.words
        words[-len(image.named):-len(image.named)] = ["-c", "abort"]
        self.sequence.run(words)
        self.sequence.take_after_death(image)

    def leak(self):
        command = leak(self.random, self.sequence.place("disk"))
        if command:
            self.sequence.log.append(command)
            self.image.is_untidy = True

    # By either program

    def snapshot(self):
        random, image = self.random, self.image
        if not image.snapshots or random.random() < 0.5:
            name = self.name("s")

            def take(_):
                image.snapshots[name] = image.disk.copy()

            def leave_leaks():
                image.is_untidy = True
            # Where a count cannot grow any more, qemu-img leaves wrong flags as well.
            return Operation(["snapshot", "-c", name, *image.opened], take, fail=leave_leaks,
                             is_for_swimg=image.refcount_bits < 8)
        name = random.choice(list(image.snapshots) * 4 + ["none"])
        if random.random() < 0.5:
            def delete(_):
                del image.snapshots[name]
            return Operation(["snapshot", "-d", name, *image.opened], delete)

        def go_back(by_swimg):
            before = image.disk
            old = image.snapshots[name].copy()
            if (image.backing and old.size > before.size) or old.known < old.size:
                # What is behind the old end is not in the model.
                old = self.sequence.judge.read(image)
            image.disk = old
            image.record_change(before)
        return Operation(["snapshot", "-a", name, *image.opened], go_back)

    def resize(self):
        random, image = self.random, self.image
        old = image.disk.size
        step = random.randrange(1, 4096) * 512 if random.random() < 0.8 else 64 * MIB
        words = []
        if random.random() < 0.6:
            new, text = old + step, random.choice([f"+{step}", str(old + step)])
            if random.random() < 0.3:
                words = [f"--preallocation={random.choice(['off', 'metadata', 'falloc', 'full'])}"]
                if step > 16 * MIB:
                    words = []
        else:
            step = min(step, old - 512)
            new, text = old - step, random.choice([f"-{step}", str(old - step)])
            words = ["--shrink"] if random.random() < 0.9 else []

        def change(by_swimg):
            self._change_size(new, by_swimg, any("prealloc" in word for word in words))
        return Operation(["resize", "-q", *words, *image.named, text], change)

    def _change_size(self, new, by_swimg, preallocates=False):
        image, old = self.image, self.image.disk.size
        image.resize(new)
        if not by_swimg and new > old:
            # qemu-img shows what the last cluster held behind the old end, and preallocates
            # free clusters at the end of the file with whatever they hold.
            end = new if preallocates else -(-old // image.cluster) * image.cluster
            image.disk.put(self.sequence.judge.read(image), old, min(new, end))

    def bitmap(self):
        random, image = self.random, self.image
        names = list(image.bitmaps)
        if not names or random.random() < 0.35:
            return self._add_bitmap()
        name = random.choice(names * 5 + ["none"])
        kind = random.choice(["remove", "clear", "clear", "enable", "disable", "merge", "merge"])
        words = ["bitmap", f"--{kind}"]
        if kind == "merge":
            return self._merge(name)

        def change(_):
            if kind == "remove":
                del image.bitmaps[name]
            elif kind == "clear":
                image.bitmaps[name].bits = 0
            else:
                image.bitmaps[name].is_enabled = kind == "enable"
        return Operation([*words, *image.named, name], change)

    def _add_bitmap(self):
        random, image, name = self.random, self.image, self.name("b")
        granularity = random.choice([None, None, 512, 4096, 65536, MIB])
        is_disabled = random.random() < 0.3
        words = ["bitmap", "--add"] + (["--disable"] if is_disabled else [])
        words += ["-g", str(granularity)] if granularity else []
        from_name = None
        if image.bitmaps and random.random() < 0.2:
            from_name = random.choice(list(image.bitmaps))
            words += ["--merge", from_name]

        def add(_):
            default = min(64 * KIB, max(4 * KIB, image.cluster))
            image.bitmaps[name] = Bitmap(granularity or default, not is_disabled)
            if from_name:
                image.merge(name, image.bitmaps[from_name])

        def leave_empty():
            # qemu-img keeps what it has added when it cannot merge.
            if from_name and image.bitmaps[from_name].is_broken:
                default = min(64 * KIB, max(4 * KIB, image.cluster))
                image.bitmaps[name] = Bitmap(granularity or default, not is_disabled)
        return Operation([*words, *image.named, name], add, fail=leave_empty)

    def _merge(self, name):
        random, image = self.random, self.image
        if random.random() < 0.6:
            source = random.choice(list(image.bitmaps))
            words = ["bitmap", "--merge", source, *image.named, name]
            return Operation(words, lambda _: image.merge(name, image.bitmaps[source]))
        size = image.disk.size + (512 if random.random() < 0.1 else 0)
        other, words = new_image(random, self.name("other"), size=size, is_plain=True)
        other.bitmaps["b"] = Bitmap(random.choice([512, 4096, 65536, MIB]), True)
        self.sequence.create(other, words)
        add = ["bitmap", "--add", "-g", str(other.bitmaps["b"].granularity), other.name, "b"]
        if self.sequence.run(["qemu-img", *add]).status != 0:
            return None
        self.write_by_qemu(Writes(random, other).add(random.randrange(1, 5)), other)

        def merge(_):
            image.merge(name, other.bitmaps["b"])
        words = ["bitmap", "--merge", "b", "-b", other.name, "-F", "qcow2", *image.named, name]
        return Operation(words, merge)

    def rebase(self):
        random, image = self.random, self.image
        if random.random() < 0.15:
            words, base = ["-b", ""], None
        else:
            base = self._base_to_rebase_to()
            words = ["-b", base.name, "-F", base.format]
        is_unsafe, had_backing = random.random() < 0.2, image.backing is not None
        compresses = not is_unsafe and random.random() < 0.15
        words = ["rebase", *(["-u"] if is_unsafe else []), *(["-c"] if compresses else []), *words]

        def change(by_swimg):
            image.backing = base.name if base else None
            image.snapshots_have_changed = True
            # qemu-img loses zeros of version 2 without a backing file.
            if is_unsafe or (not by_swimg and image.is_version_2 and not had_backing):
                image.disk = self.sequence.judge.read(image)
            else:
                image.record_change(image.disk)
        return Operation([*words, *image.named], change, qemu_has_it=not compresses,
                         has_equal_twin=had_backing or not image.is_version_2)

    def _base_to_rebase_to(self):
        chain = self.sequence.chain()[1:]
        if len(chain) > 1 and self.random.random() < 0.5:
            return chain[-1]
        return self.sequence.new_base(self.name("base"), self.random.random() < 0.5)

    def commit(self):
        random, image = self.random, self.image
        chain = self.sequence.chain()[1:]
        words, base, drops = ["commit", "-q"], chain[0] if chain else None, random.random() < 0.4
        if chain and random.random() < 0.4:
            base, drops = random.choice(chain), True
            words += ["-b", base.name]
        elif drops:
            words += ["-d"]

        def change(by_swimg):
            before = base.disk.copy()
            size = max(before.size, image.disk.size)
            base.resize(size)
            base.disk.put(image.disk, 0, image.disk.size)
            base.record_change(before)
            base.snapshots_have_changed = True
            for other in chain[:chain.index(base)]:
                other.disk = self.sequence.judge.read(other)
                other.snapshots_have_changed = True
            image.snapshots_have_changed = True
            for bitmap in image.bitmaps.values():
                bitmap.may_have_more = bitmap.is_enabled
        return Operation([*words, *image.named], change, has_equal_twin=True)

    def amend(self):
        random, image = self.random, self.image
        key = random.choice(["compat", "compat", "refcount_bits", "lazy_refcounts", "size"])
        value = {"compat": random.choice(["0.10", "1.1"]),
                 "refcount_bits": random.choice([1, 2, 4, 8, 16, 32, 64]),
                 "lazy_refcounts": random.choice(["on", "off"]),
                 "size": image.disk.size + random.choice(
                     [random.randrange(-100, 1000) * 512, 40 * MIB])}[key]
        if key == "size" and value <= 0:
            value = image.disk.size
        options = {key: value}
        if key == "refcount_bits" and random.random() < 0.3:
            options["compat"] = "1.1"

        def change(by_swimg):
            if key == "size":
                self._change_size(value, by_swimg)
            self.sequence.take_options(image)
        # qemu-img takes minutes for new refcounts with large clusters, and leaks what bitmaps had.
        qemu_does_well = not (key == "refcount_bits" and image.cluster >= 256 * KIB
                              or value == "0.10" and image.bitmaps)
        return Operation(["amend", *option_words(options), *image.named], change,
                         qemu_has_it=qemu_does_well)

    def check(self):
        image = self.image
        what = "all" if image.is_dirty or self.random.random() < 0.5 else "leaks"

        def change(_):
            image.is_untidy = image.is_dirty = False
        return Operation(["check", "-q", "-r", what, *image.named], change,
                         qemu_has_it=not (image.snapshots and image.bitmaps))

    def convert_into(self):
        random, image = self.random, self.image
        size = random.randrange(1, image.disk.size // 512 + 1) * 512
        if random.random() < 0.3:
            size = image.disk.size + random.choice([0, 0, 512])
        format = random.choice(["raw", "qcow2"])
        source, words = new_image(random, self.name("src"), None, format, size, is_plain=True)
        self.sequence.create(source, words)
        self.write_by_qemu(Writes(random, source).add(random.randrange(1, 9)), source)
        compresses = random.random() < 0.2
        words = ["convert", "-n", *random.choice([[], ["-W"], ["-m", "3"]]), "-f", format]
        words += ["-c"] if compresses else []
        words += (SECRET + ["--target-image-opts", source.name, image.description]
                  if image.is_encrypted else ["-O", "qcow2", source.name, image.name])

        def change(by_swimg):
            before = image.disk.copy()
            image.disk.put(source.disk, 0, source.disk.size)
            image.record_change(before)

        def leave_half():
            image.disk = self.sequence.judge.read(image)
            self.sequence.take_bitmaps(image)
        # With -W, qemu-img frees clusters of zeros that it writes.
        return Operation(words, change, is_like_qemu=not compresses, fail=leave_half,
                         is_for_swimg="-W" in words)

    def copy(self):
        random, image = self.random, self.image
        format = random.choice(["raw", "qcow2", "qcow2"])
        words, name, disk = ["convert", "-O", format], self.name("copy"), image.disk
        copy, _ = new_image(random, name, None, format, image.disk.size)
        if format == "qcow2":
            copy.options = {k: v for k, v in random_options(random).items() if k != "data_file_raw"}
            if copy.options.get("data_file"):
                copy.options["data_file"] = "copy-data"
            copy.is_encrypted = "encrypt.format" in copy.options
            words += option_words(copy.options)
            words += ["-c"] if random.random() < 0.3 else []
            if random.random() < 0.4:
                words += ["--bitmaps"]
                words += ["--skip-broken-bitmaps"] if random.random() < 0.5 else []
                copy.bitmaps = {n: b for n, b in image.bitmaps.items() if not b.is_broken}
        if image.snapshots and random.random() < 0.4:
            snapshot = random.choice(list(image.snapshots))
            words += ["-l", f"snapshot.name={snapshot}"]
            disk = self.sequence.judge.read(image, snapshot)
        words += random.choice([[], ["-W"], ["-m", "2"]])
        if image.is_encrypted and "--object" in words:
            words += ["--image-opts", image.description]
        else:
            words += image.named
        copy.disk = disk

        def look(_):
            self.sequence.judge.compare(copy)
        return Operation([*words, name], look)
