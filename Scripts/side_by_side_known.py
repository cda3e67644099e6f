"""Known differences from qemu-img: rows of docs/differences.md, each with a test for it."""

import re

# Message parts that callers search for: swimg must print them where qemu-img does.
PARSED = ["Unsupported preallocation mode", "No such file or directory", "No space left", "Failed to get",
          "Use the --shrink option"]


def refuses(pattern):
    """swimg ends with an error that matches, whatever qemu-img does."""
    return lambda pair: pair.own.status not in [0, "timeout"] and re.search(pattern, pair.own.stderr) is not None


def they_say(verb, pattern):
    return lambda pair: pair.verb == verb and re.search(pattern, pair.theirs.stderr) is not None


def wording(pair):
    stdout = [pair.normalized(outcome.stdout) for outcome in [pair.theirs, pair.own]]
    return (pair.own.status == pair.theirs.status != 0 and stdout[0] == stdout[1] and not pair.judgement
            and 1 <= pair.own.stderr.count("\n") <= pair.theirs.stderr.count("\n")
            and all(text in pair.own.stderr for text in PARSED if text in pair.theirs.stderr))


def layout(verb):
    """The results differ only in where data is stored."""
    return lambda pair: pair.verb == verb and pair.layout and len(pair.difference()) == len(pair.layout)


def control_characters(pair):
    return pair.own.status == pair.theirs.status and re.search(r"[\x00-\x09\x0b-\x1f]", pair.theirs.stdout) is not None


def cut_listing(pair):
    return pair.verb == "map" and pair.own.status == pair.theirs.status == 1


def crash(pair):
    return pair.theirs.status not in [0, "timeout"] and pair.theirs.status < 0 and pair.own.status == 1


def endless(pair):
    return pair.theirs.status == "timeout" and pair.own.status != "timeout"


def words_in_any_place(pair):
    return pair.verb == "resize" and pair.theirs.status == 1 and re.search(
        "Expecting image file name and size|missing argument for option", pair.theirs.stderr) is not None


def usage_on_stdout(pair):
    return pair.verb == "measure" and pair.own.status == 1 and "usage: qemu-img" in pair.theirs.stdout


def abbreviation(pair):
    return "unrecognized option '--" in pair.own.stderr and pair.own.status == 1


def uncovered(pair):
    """The only difference is the data that the last cluster held after the old end of the disk."""
    places = [re.fullmatch(r"compare of the results: Content mismatch at offset (\d+)!", line)
              for line in pair.judgement]
    return (pair.verb == "resize" and len(places) == 1 and places[0] is not None
            and int(places[0][1]) == pair.old_size and len(pair.difference()) == 1 + len(pair.layout))


def strict_offset(pair):
    """Both find a difference, but swimg reports a block status at the start of an image that looks
    preallocated."""
    return (pair.verb == "compare" and "-s" in pair.words and pair.own.status == pair.theirs.status == 1
            and re.search(r"^Strict mode: Offset \d+ block status mismatch!\n$", pair.own.stdout)
            and "mismatch" in pair.theirs.stdout)


def lost_snapshots(pair):
    lines = "\n".join(pair.judgement)
    return pair.verb == "check" and "-r" in pair.words and "+/snapshots = " in lines and "-/snapshots = " not in lines


def snapshot_table(pair):
    return (pair.verb == "check" and "-r" in pair.words
            and "snapshot table entry" in pair.theirs.stderr + pair.own.stderr)


def repair_failed(pair):
    return (pair.verb == "check" and "-r" in pair.words and pair.theirs.status == 1 and pair.own.status in [0, 2, 3]
            and "Check failed" in pair.theirs.stderr)


def damaged_bitmaps(pair):
    return pair.theirs.status != 0 and re.search("Bitmap '.*' doesn't satisfy the constraints", pair.theirs.stderr)


def damage(pair):
    """swimg refuses damage by name, while qemu-img continues or fails later."""
    return (pair.is_damaged and pair.own.status not in [0, "timeout"] and pair.own.status > 0
            and pair.own.stderr.count("\n") == 1 and pair.verb != "check")


def has_errors(pair):
    return pair.verb == "resize" and "has errors: repair it first" in pair.own.stderr and pair.own.status == 1


def not_closed(pair):
    return pair.verb == "resize" and "not closed cleanly" in pair.own.stderr and pair.own.status == 1


def ragged(pair):
    return pair.is_ragged and (pair.own.status == pair.theirs.status or pair.verb == "compare" and "-s" in pair.words)


def behind_the_end(pair):
    """qemu-img's result has damage and swimg's has none; nothing else differs."""
    lines = [line for line in pair.judgement if line.startswith("check of the result: exit code ")]
    return (pair.verb == "resize" and pair.is_damaged and pair.own.status == pair.theirs.status == 0
            and [line.split()[6:8] for line in lines] == [["2", "0"]])


def stale_bitmaps(pair):
    rest = re.sub(r"qemu-img: warning: a program lacking bitmap support .*\nSome clusters may be leaked, .*fix\.\n?",
                  "", pair.theirs.stderr)
    return (rest != pair.theirs.stderr and pair.own.status == pair.theirs.status and not pair.judgement
            and pair.normalized(pair.own.stdout) == pair.normalized(pair.theirs.stdout)
            and (rest == "") == (pair.own.stderr == ""))


KNOWN = [
    ("wording of refusals: one line, names the file", wording),
    ("not supported yet", refuses(r"not supported yet|(is|are) not supported|unknown format '(?!nosuch)")),
    ("L1, L2 or snapshot tables beyond the end of the file", refuses(r"table at offset \d+ lies beyond the end")),
    ("data and compressed clusters that lie wholly beyond the end of the file",
     refuses(r"(data|compressed) cluster of guest offset \d+ at offset \d+ lies beyond the end")),
    ("a deflate stream that is cut short", refuses("compressed data is damaged or cut short")),
    ("reserved bits in L1 and L2 entries, zero flags in version 2", refuses(r"bad L[12] entry .*(reserved bits|version 2)")),
    ("a backing chain that leads back into itself", refuses("backing chain leads back")),
    ("a FIFO or a character device as a source, target or backing file", refuses("neither a regular file nor a block")),
    ("control characters in names", control_characters),
    ("check and the backing file", they_say("check", "backing file|ext_backing_format")),
    ("check of encrypted qcow2 images", they_say("check", "encrypt.key-secret")),
    ("where qemu-img crashes", crash),
    ("where qemu-img does not end", endless),
    ("map of a damaged image", cut_listing),
    ("resize: options behind the size", words_in_any_place),
    ("measure with a wrong option", usage_on_stdout),
    ("long options cut short", abbreviation),
    ("dd and zeros", layout("dd")),
    ("resize, convert and create: where clusters lie", layout("resize")),
    ("resize, convert and create: where clusters lie", layout("convert")),
    ("resize, convert and create: where clusters lie", layout("create")),
    ("check -r and where the file ends", layout("check")),
    ("resize of a disk that ends within a cluster", uncovered),
    ("resize --shrink and entries behind the end", behind_the_end),
    ("resize of an image that was not closed cleanly", not_closed),
    ("resize of an image with errors", has_errors),
    ("compressed clusters with subclusters", refuses("a compressed cluster has subclusters")),
    ("compare -s: which offset", strict_offset),
    ("check -r and the snapshot table", snapshot_table),
    ("check -r of images with snapshots", lost_snapshots),
    ("check -r where it cannot help", refuses("another part of the image: it cannot be changed")),
    ("check -r all where qemu-img gives up", repair_failed),
    ("damaged bitmaps", damaged_bitmaps),
    ("other damage is refused, too", damage),
    ("a qcow2 disk whose size is no multiple of 512", ragged),
    ("a warning of bitmaps that are out of date", stale_bitmaps),
]
