"""The command lines that side-by-side.py runs."""

import dataclasses
import os
import subprocess
import typing

KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass
class Command:
    words: list
    # Whether the command works on `copy`, which is copied from the image beforehand.
    changes: bool = False
    # A file that the command leaves, and its format.
    judged: typing.Optional[tuple] = None
    # Called with each program's folder beforehand.
    prepare: typing.Optional[typing.Callable] = None


def qcow2_option_words(random):
    """Random options of qcow2, most of them valid."""
    options = {}
    if random.random() < 0.25:
        options["compat"] = random.choice(["0.10", "1.1", "v2", "v3", "1.0"])
    if random.random() < 0.5:
        options["cluster_size"] = random.choice(["512", "4k", "16k", "64k", "128k", "1M", "2M", "4M", "100", "3000"])
    if random.random() < 0.3:
        options["refcount_bits"] = random.choice(["1", "4", "8", "16", "32", "64", "5", "128"])
    if random.random() < 0.2:
        options["lazy_refcounts"] = random.choice(["on", "off", "maybe"])
    if random.random() < 0.2:
        options["extended_l2"] = random.choice(["on", "off"])
    if random.random() < 0.3:
        options["compression_type"] = random.choice(["zlib", "zstd", "lz4"])
    if random.random() < 0.3:
        options["preallocation"] = random.choice(["off", "metadata", "falloc", "full", "all"])
    return ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []


def image_commands(random, name, format, size, snapshots, folders, few=False):
    """The commands to run on one image; `few` selects the short list for fixtures."""
    commands = [
        Command(["info", name]),
        Command(["info", "--output=json", name]),
        Command(["info", "--backing-chain", "--output=json", name]),
        Command(["map", "--output=json", name]),
        Command(["map", name]),
        Command(["check", name]),
        Command(["check", "--output=json", "-f", format, name]),
        Command(["measure", "--output=json", "-O", random.choice(["raw", "qcow2"]), name]),
        Command(["compare", "-f", format, "-F", format, name, name]),
        Command(["convert", "-f", format, "-O", "raw", name, "out"], judged=("out", "raw")),
    ]
    if format == "qcow2":
        for leaks in ["leaks", "all"]:
            commands.append(Command(["check", "-f", format, "-r", leaks, "copy"], True, ("copy", format)))
    # qemu-img would wait forever or exhaust the memory.
    if "fifo" in name or "loop" in name or "self" in name:
        return [commands[0]] + ([] if "-b." in name or "self" in name else [commands[9]])
    if few:
        return [*commands, _resize(random, format, size), Command(["info", "-f", format, name])]
    commands += _reading(random, name, format, size)
    commands += [_resize(random, format, size) for _ in range(3)]
    commands += _comparing(random, name, format, size, folders)
    commands += [_creating(random, name, format) for _ in range(2)]
    commands += [_dd(random, name, format, size)]
    commands += [_converting(random, name, format, size, snapshots) for _ in range(3)]
    return commands


def _reading(random, name, format, size):
    start = random.choice([0, 1, 511, 65536, size // 2, size, size + 512])
    length = random.choice([0, 1, 512, 65536, size // 3, size])
    option = qcow2_option_words(random)
    return [
        random.choice([
            Command(["info", "--backing-chain", name]), Command(["info", "-f", "raw", "--output=json", name]),
            Command(["info", name, "-U", "--output", "json", "-f", format]), Command(["info", "-f", "vmdk", name]),
            Command(["info", "--image-opts", f"driver={format},file.driver=file,file.filename={name}"])]),
        Command(["map", *random.choice([[], ["--output=json"]]), f"--start-offset={start}", f"--max-length={length}",
                 "-f", format, name]),
        random.choice([
            Command(["check", "-q", name]), Command(["check", "--output", "json", name, "-U"]),
            Command(["check", "-f", "raw", name]), Command(["check", "-T", "writeback", name])]),
        Command(["measure", "-O", "qcow2", *option, "-f", format, name]),
        Command(["measure", "-O", "qcow2", *qcow2_option_words(random), "--output=json", "--size",
                 random.choice(["0", "1", "512", "1M", "1000000", "1G", "10T", str(size)])]),
    ]


def _resize(random, format, size):
    new = random.choice([0, 1, 512, size // 2 // 512 * 512, size // 2, max(0, size - 512), size, size + 512,
                         size + 3 * MIB, 1 << 30, size * 4])
    amount = random.choice([str(new), str(new), f"+{random.choice([1, 512, 65536, MIB, 1 << 30])}", "1M", "+1k", "-512",
                            f"-{size // 2}"])
    words = ["resize", *random.choice([[], ["--shrink"], ["--shrink"], ["-q"]]), "-f", format]
    if random.random() < 0.2 and size < 16 * MIB and new < 64 * MIB and amount != f"+{1 << 30}":
        words.append("--preallocation=" + random.choice(["off", "metadata", "falloc", "full", "some"]))
    return Command([*words, "copy", amount], True, ("copy", format))


def _comparing(random, name, format, size, folders):
    """Compares an image with itself, with a copy in another format and with a changed copy; the
    real qemu-img makes the copies."""
    other = "raw" if format == "qcow2" else "qcow2"
    place = folders["theirs"]
    made = subprocess.run(["qemu-img", "convert", "-f", format, "-O", other, name, "other"], cwd=place,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0
    commands = [Command(["compare", "-s", name, name])]
    if not made:
        return commands
    os.link(os.path.join(place, "other"), os.path.join(folders["own"], "other"))
    commands += [Command(["compare", *random.choice([[], ["-s"], ["-q"], ["-p"]]), "-f", format, "-F", other,
                          name, "other"])]
    changed = os.path.join(place, "changed")
    subprocess.run(["cp", "--sparse=auto", os.path.join(place, "other"), changed], check=True)
    at = random.randrange(max(1, size)) // 512 * 512
    subprocess.run(["qemu-io", "-f", other, "-c", f"write -P 77 {at} 512", changed], stdin=subprocess.DEVNULL,
                   capture_output=True)
    if random.random() < 0.3:
        subprocess.run(["qemu-img", "resize", "-q", "-f", other, changed, "+1M"], capture_output=True)
    os.link(changed, os.path.join(folders["own"], "changed"))
    flags = random.choice([[], ["-s"], ["-q"], ["-s", "-q"]])
    return commands + [Command(["compare", *flags, "-F", other, name, "changed"]),
                       Command(["compare", "changed", name])]


def _creating(random, name, format):
    kind = random.choice(["qcow2", "qcow2", "qcow2", "raw"])
    words = ["create", *random.choice([[], [], ["-q"]]), "-f", kind]
    if kind == "qcow2":
        words += qcow2_option_words(random)
        if random.random() < 0.4:
            words += ["-b", name, *random.choice([["-F", format], ["-F", format], [], ["-F", "raw"]])]
    elif random.random() < 0.4:
        words += ["-o", "preallocation=" + random.choice(["off", "falloc", "full", "metadata"])]
    size = random.choice(["0", "1", "513", "64k", "1M", "1000001", "16M", "1.5G", "2T"])
    # Full allocation needs space on the file system.
    if any(word in " ".join(words) for word in ["falloc", "full"]) and size in ["1.5G", "2T"]:
        size = "4M"
    if random.random() < 0.15:
        return Command([*words, "out"], judged=("out", kind))
    return Command([*words, "out", size], judged=("out", kind))


def _dd(random, name, format, size):
    kind = random.choice(["raw", "qcow2"])
    words = ["dd", "-f", format, "-O", kind, f"if={name}", "of=out"]
    block = random.choice([None, 512, 1000, 4096, 65536, MIB] if size <= 16 * MIB else [MIB])
    if block:
        words.append(f"bs={block}")
    if size > 16 * MIB:
        # qemu-img also writes zeros.
        return Command([*words, f"count={random.choice([0, 1, 3, 8])}"], judged=("out", kind))
    for option in ["count", "skip"]:
        if random.random() < 0.4:
            words.append(f"{option}={random.choice([0, 1, 3, 100, 100000])}")
    return Command(words, judged=("out", kind))


def _converting(random, name, format, size, snapshots):
    kind = random.choice(["raw", "qcow2", "qcow2"])
    words = ["convert", *random.choice([[], [], ["-f", format]]), "-O", kind]
    if kind == "qcow2":
        words += random.choice([[], [], ["-c"]]) + qcow2_option_words(random)
    # Full allocation needs space on the file system.
    if size > 16 * MIB and "-o" in words:
        del words[words.index("-o"):]
    words += random.choice([[], [], ["-p"], ["-q"], ["-W"], ["-m", "4"], ["-S", "0" if size <= 16 * MIB else "1M"], ["-S", "64k"], ["-U"], ["-n"],
                            ["-t", "none", "-T", "none"], ["-t", "writeback"], ["--bitmaps"]])
    if snapshots or random.random() < 0.05:
        words += random.choice([[], ["-l", "s0"], ["-l", "snapshot.name=s0"], ["-l", "nosuch"]])
    return Command([*words, name, "out"], judged=("out", kind))


def usage_commands(seed, folders):
    """Invalid command lines, and valid ones that need no image."""
    for place in folders.values():
        for words in [["-f", "raw", "a.raw", "1M"], ["-f", "qcow2", "a.qcow2", "1M"]]:
            subprocess.run(["qemu-img", "create", "-q", *words], cwd=place, check=True)
        os.mkdir(os.path.join(place, "folder"))
        with open(os.path.join(place, "junk"), "wb") as file:
            file.write(b"nothing in particular\n" * 100)
    verbs = ["check", "compare", "convert", "create", "dd", "info", "map", "measure", "resize"]
    lines = ["", "nosuchverb", "--nosuch"]
    for verb in verbs:
        two = {"compare": " a.raw", "convert": " out", "resize": " 2M"}.get(verb, "")
        lines += [verb, f"{verb} --nosuch", f"{verb} -Y", f"{verb} -f", f"{verb} nosuch{two}"]
        if verb not in ["create", "dd"]:
            lines += [f"{verb} -f nosuch a.raw{two}", f"{verb} -f qcow2 a.raw{two}", f"{verb} folder{two}",
                      f"{verb} junk{two}", f"{verb} -f qcow2 nosuch{two}", f"{verb} /dev/null/x{two}",
                      f"{verb} --output a.raw{two}", f"{verb} --image-opts nosuch{two}",
                      f"{verb} --image-opts driver=qcow2,file.filename=a.qcow2{two}",
                      f"{verb} -f qcow2 --image-opts file.filename=a.qcow2{two}"]
    lines += [
        "info a.raw a.raw", "info --output=xml a.raw", "info -f raw -f qcow2 a.qcow2", "info a.qcow2 -f qcow2",
        "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}",
        "info file:a.qcow2", "info --output json a.qcow2", "info --outp json a.qcow2", "info -- a.qcow2", "info nosuch:a",
        "map a.raw a.raw", "map --output=xml a.raw", "map -s x a.raw", "map -s 1k -l 1k a.raw", "map -s -1 a.raw",
        "map --max-length=nosuch a.raw", "check a.raw", "check a.raw a.raw", "check -r nosuch a.qcow2",
        "check -r all a.raw", "check --output=xml a.qcow2", "check -T nosuch a.qcow2", "check -r all --output=json a.qcow2",
        "compare a.raw", "compare a.raw a.raw a.raw", "compare a.raw a.qcow2", "compare -F nosuch a.raw a.raw",
        "compare -T nosuch a.raw a.raw", "compare a.raw nosuch", "compare -q a.raw nosuch", "compare -p a.raw a.qcow2",
        "compare -f raw a.qcow2 a.raw", "compare a.raw junk",
        "measure", "measure --size", "measure --size x", "measure --size -1", "measure --size 1G a.raw", "measure --size 1G",
        "measure --size 1G -O nosuch", "measure --size 1G -O qcow2 -o nosuch=1", "measure --size 1G -f raw",
        "measure --size 1G -O qcow2 -o cluster_size=3", "measure --output=xml --size 1G", "measure a.raw a.raw",
        "measure --size 1G -O raw --output json", "measure -O qcow2 -l s0 a.qcow2", "measure --size 8E -O qcow2",
        "resize a.raw", "resize 2M", "resize a.raw x", "resize a.raw 1M 2M", "resize a.raw 512k", "resize -q a.raw 512k",
        "resize a.qcow2 512k", "resize --shrink a.raw 512k", "resize a.raw 1M", "resize a.raw +1M", "resize a.raw -2M",
        "resize --shrink a.raw -100M", "resize a.qcow2 +0", "resize a.qcow2 8E", "resize a.qcow2 9999999P", "resize a.raw ''",
        "resize -f raw a.raw 1.5M", "resize --preallocation=nosuch a.raw 4M", "resize --preallocation=metadata a.raw 4M",
        "resize -f raw a.raw 4M --preallocation=full", "resize -f qcow2 a.qcow2 4M --preallocation=falloc",
        "resize a.qcow2 --shrink --preallocation=full 512k", "resize a.raw 2M -f raw", "resize a.raw 2M -q",
        "create", "create out", "create out x", "create out -1", "create out 1M 2M", "create -f nosuch out 1M",
        "create -f qcow2 out 1M -o nosuch=1", "create -f qcow2 out 1M -o cluster_size", "create -f raw out 1M -o cluster_size=1k",
        "create -f raw -b a.raw out 1M", "create -f qcow2 -b nosuch -F raw out 1M", "create -f qcow2 -b nosuch -F raw -u out 1M",
        "create -f qcow2 -b a.raw out", "create -f qcow2 -b a.raw -F raw out", "create -f qcow2 -b a.raw -F qcow2 out",
        "create -f qcow2 -F raw out 1M", "create -f qcow2 -b a.raw -F nosuch out 1M", "create -f qcow2 -u -b a.raw -F raw out",
        "create -f qcow2 -o ?", "create -f raw -o help", "create -f qcow2 -o help", "create -f qcow2 -o help out",
        "create -f raw out 9E", "create -f raw folder 1M", "create -f raw folder/no/such 1M", "create -f qcow2 out 1M -o size=2M",
        "create -f qcow2 -o backing_file=a.raw,backing_fmt=raw out", "create -f qcow2 -o data_file=data out 1M",
        "create -f qcow2 -o data_file=data,data_file_raw=on out 1M", "create -f raw -o preallocation=nosuch out 1M",
        "create -f qcow2 -o preallocation=metadata,preallocation=off out 1M", "create -f raw out 1MB", "create -f raw out 0x1000",
        "create -f qcow2 -o encrypt.format=luks out 1M", "create -f qcow2 -o encryption=on out 1M", "create -f raw -o nocow=on out 1M",
        "create -f qcow2 -o extent_size_hint=1M out 1M", "create -q -f raw out 1M", "create -f qcow2 out 1025",
        "dd if=a.raw", "dd of=out", "dd if=a.raw of=out bs=0", "dd if=a.raw of=out bs=x", "dd if=a.raw of=out nosuch=1",
        "dd if=a.raw of=out bs=1M count=1", "dd if=nosuch of=out", "dd if=a.raw of=out count=-1", "dd if=a.raw of=out skip=1000000",
        "dd -f nosuch if=a.raw of=out", "dd -O nosuch if=a.raw of=out", "dd if=a.raw of=a.raw nosuch", "dd a.raw out",
        "dd -O qcow2 if=a.raw of=out", "dd if=a.raw of=folder/no/such", "dd -n if=a.raw of=out",
        "convert a.raw", "convert -O nosuch a.raw out", "convert -O qcow2 -o nosuch=1 a.raw out", "convert -m 0 a.raw out",
        "convert -m x a.raw out", "convert -S x a.raw out", "convert -t nosuch a.raw out", "convert -T nosuch a.raw out",
        "convert -c a.raw out", "convert -c -O raw a.raw out", "convert -n a.raw nosuch", "convert -o help", "convert -O qcow2 -o help",
        "convert -r x a.raw out", "convert -r 1M a.raw out", "convert -B a.raw -O raw a.qcow2 out", "convert -O qcow2 -B nosuch a.raw out",
        "convert -O qcow2 -B a.raw -F raw a.qcow2 out", "convert a.raw folder", "convert a.raw folder/no/such", "convert a.raw a.raw out",
        "convert -n -o preallocation=off a.raw a.qcow2", "convert -l nosuch a.qcow2 out", "convert -l x -l y a.raw out",
        "convert --target-is-zero a.raw out", "convert --bitmaps a.raw out", "convert --skip-broken-bitmaps -O qcow2 a.qcow2 out",
        "convert -O raw -o preallocation=nosuch a.raw out", "convert -O raw -o preallocation=metadata a.raw out",
        "convert -p -O qcow2 a.raw out", "convert -q -O qcow2 a.raw out", "convert -a x a.raw out", "convert -6 a.raw out",
        "convert -O qcow2 -o compat=0.9 a.raw out", "convert -C -S 4k a.raw out", "convert -Of a.raw out", "convert -Oqcow2 a.raw out",
    ]
    kinds = {"create": "qcow2", "convert": "raw", "dd": "raw"}
    commands = []
    for line in lines:
        words = [word if word != "''" else "" for word in line.split(" ")] if line else []
        kind = kinds.get(words[0] if words else "")
        if kind and ("-f qcow2" in line or "-O qcow2" in line or "-Oqcow2" in line):
            kind = "qcow2"
        elif words[:1] == ["create"]:
            kind = "raw"
        commands.append(Command(words, judged=("out", kind) if kind else None, prepare=_small_images))
    return commands


def _small_images(place):
    """Restores the small images, which earlier commands may have changed."""
    for name in ["a.raw", "a.qcow2"]:
        path = os.path.join(place, name)
        with open(path, "rb") as file:
            before = file.read(MIB * 2)
        _small_images.kept.setdefault(name, before)
        if before != _small_images.kept[name]:
            os.remove(path)
            with open(path, "wb") as file:
                file.write(_small_images.kept[name])


_small_images.kept = {}
