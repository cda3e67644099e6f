import Foundation
import Glibc
import TestSupport
import Testing

/// The place where a target is created, and the leftovers if that fails.
@Suite struct StagingTests {
    let folder: TempFolder
    let sketch = DiskSketch("A1-b0+-C")

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    private func expectContent(_ name: String, at location: SourceLocation = #_sourceLocation)
        throws
    {
        #expect(
            try mismatch(contents(folder.path(name)), sketch.bytes) == nil,
            sourceLocation: location)
    }

    // MARK: Links of other users

    /// Whether the tests can switch on the kernel's protection of links.
    private static let canProtectLinks =
        isRoot && hasProgram("setpriv")
        && access("/proc/sys/fs/protected_symlinks", W_OK) == 0

    @Test(.enabled(if: canProtectLinks, "fs.protected_symlinks cannot be set here"))
    func linksInSharedFoldersAreTheKernels() throws {
        let setting = "/proc/sys/fs/protected_symlinks"
        let before = try contents(setting)
        try Data("1".utf8).write(to: URL(fileURLWithPath: setting))
        defer { try? before.write(to: URL(fileURLWithPath: setting)) }
        _ = try folder.makeFolder("shared")
        chmod(folder.path, 0o755)
        chmod(folder.path("shared"), 0o1777)
        let victim = try folder.write("victim", Array("precious".utf8))
        for (link, place) in [("old", victim), ("new", folder.path("fresh"))] {
            try require(
                "setpriv",
                ["--reuid", "65534", "--regid", "65534", "--clear-groups", "ln", "-s", place]
                    + [folder.path("shared/\(link)")])
        }
        for link in ["shared/old", "shared/new"] {
            for words in [
                ["convert", "source", link], ["convert", "-O", "qcow2", "source", link],
                ["convert", "-n", "source", link], ["create", "-q", "-f", "raw", link, "1M"],
                ["create", "-q", "-f", "qcow2", link, "1M"], ["dd", "if=source", "of=\(link)"],
                ["resize", "-f", "raw", link, "1M"],
            ] {
                let outcome = try run(Swimg.path, words, in: folder.path)
                expectRefusal(outcome, says: "Permission denied")
                #expect(try contents(victim) == Data("precious".utf8), "\(outcome)")
                #expect(folder.names == ["shared", "source", "victim"], "\(outcome)")
            }
        }
        #expect(TempFolder.names(in: folder.path("shared")) == ["new", "old"])
    }

    // MARK: Append-only folders

    @Test(.enabled(if: isRoot && hasProgram("chattr"), "chattr needs root"))
    func appendOnlyFolderKeepsNothingHidden() throws {
        let inner = try folder.makeFolder("inner")
        try writeNoise(folder.path("inner/old"), count: 100_000)
        guard try run("chattr", ["+a", inner]).isSuccess else { return }
        defer { _ = try? run("chattr", ["-a", inner]) }
        for name in ["inner/old", "inner/new", "inner/new"] {
            expectSuccess(try Swimg.convert("source", name, in: folder.path))
            try expectContent(name)
            #expect(!TempFolder.names(in: inner).contains { $0.hasPrefix(".") })
        }
        // Without /proc a new file needs a temporary name, which an append-only folder would keep.
        let hidden = try run(
            "unshare",
            [
                "-m", "sh", "-c",
                "mount -t tmpfs none /proc && exec \"$0\" convert source inner/other",
            ]
                + [Swimg.path], in: folder.path)
        expectSuccess(hidden)
        try expectContent("inner/other")
        #expect(TempFolder.names(in: inner) == ["new", "old", "other"])
    }

    /// Without /proc a target is written under a temporary name, as on file systems without
    /// O_TMPFILE.
    @Test(.enabled(if: isRoot && hasProgram("unshare"), "mounting over /proc needs root"))
    func killedConversionsAreClearedAway() throws {
        try writeNoise(folder.path("large"), count: 200 << 20)
        _ = try folder.makeFolder("inner")
        let script = """
            mount -t tmpfs none /proc || exit 77
            "$0" convert -t writethrough large inner/target & victim=$!
            for i in $(seq 500); do ls -A inner | grep -q swimg && break; sleep 0.01; done
            kill -9 $victim; wait $victim 2> /dev/null
            ls -A inner | grep -c swimg
            "$0" convert -t writethrough large inner/other & alive=$!
            for i in $(seq 500); do ls -A inner | grep -q .other.swimg && break; sleep 0.01; done
            "$0" convert source inner/target && "$0" convert source inner/other || exit 1
            ls -A inner | grep -c other.swimg
            wait $alive && ls -A inner
            """
        let outcome = try run(
            "unshare", ["-m", "sh", "-c", script, Swimg.path], in: folder.path, timeout: 120)
        // One leftover; the running conversion's file stays while other conversions finish.
        #expect(outcome.outputText == "1\n1\nother\ntarget\n", "\(outcome)")
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try expectContent("inner/target")
    }

    // MARK: Profiles

    /// Imitates an AppArmor profile that lets a program write its target and no other file.
    private static let profile = """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <fcntl.h>
        #include <stdarg.h>
        #include <string.h>
        static int is_denied(const char *path, int flags) {
            const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
            return (flags & O_TMPFILE) == O_TMPFILE || ((flags & O_CREAT) && name[0] == '.');
        }
        #define MODE va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);
        #define DENY if (is_denied(path, flags)) { errno = ERROR; return -1; }
        int openat(int folder, const char *path, int flags, ...) {
            MODE DENY
            return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat"))(folder, path, flags, mode);
        }
        int open(const char *path, int flags, ...) {
            MODE DENY
            return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
        }
        int linkat(int a, const char *b, int c, const char *d, int e) { errno = ERROR; return -1; }
        int rename(const char *a, const char *b) { errno = ERROR; return -1; }
        int renameat(int a, const char *b, int c, const char *d) { errno = ERROR; return -1; }
        """

    @Test(.enabled(if: Preload.isUsable, "needs a C compiler"), arguments: ["EACCES", "EPERM"])
    func targetIsWrittenWhereNothingElseIsAllowed(_ error: String) throws {
        let library = try Preload("#define ERROR \(error)\n" + Self.profile)
        func swimg(_ words: String) throws -> Outcome {
            try run(
                Swimg.path, words.words, in: folder.path, environment: library.environment)
        }
        for line in [
            "convert source target", "convert source target",
            "convert -O raw -t writeback source t2",
        ] {
            expectSuccess(try swimg(line))
            try expectContent(line.words.last ?? "")
        }
        expectSuccess(try swimg("convert -O qcow2 source t3"))
        expectSuccess(try swimg("convert t3 t4"))
        try expectContent("t4")
        expectSuccess(try swimg("create -q -f qcow2 t5 1M"))
        // A failure leaves no new file and no target that looks complete.
        let digest = "--expect-digest " + String(repeating: "0", count: 64)
        let before = folder.names
        expectRefusal(try swimg("convert \(digest) source fresh"))
        expectRefusal(try swimg("convert \(digest) source target"))
        #expect(folder.names == before && FileStatus(folder.path("target"))?.size == 0)
    }

    // MARK: Inode flags

    /// The inode flags of a file, limited to those that the tests set.
    private static func flags(_ path: String) throws -> String {
        String(try require("lsattr", [path]).prefix { $0 != " " }).filter { "SAdC".contains($0) }
    }

    private static let writers = [
        "convert source NAME", "convert -O qcow2 source NAME", "create -q NAME 1M",
    ]

    private func write(_ command: String, to target: String) throws {
        let words = command.words.map { $0 == "NAME" ? target : $0 }
        expectSuccess(try run(Swimg.path, words, in: folder.path))
    }

    @Test(
        .enabled(if: isRoot && hasProgram("chattr"), "chattr needs root"), arguments: writers)
    func inodeFlagsStay(_ command: String) throws {
        try writeNoise(folder.path("target"), count: 100_000)
        guard try run("chattr", ["+SAd", folder.path("target")]).isSuccess else { return }
        #expect(try Self.flags(folder.path("target")) == "SdA")
        try write(command, to: "target")
        #expect(try Self.flags(folder.path("target")) == "SdA")
    }

    @Test(
        .enabled(
            if: MountedFolder.isUsable && hasProgram("mkfs.btrfs"), "mounting btrfs needs root"),
        arguments: writers)
    func noCopyOnWriteStaysAndIsSet(_ command: String) throws {
        let mount = try MountedFolder(make: ["mkfs.btrfs", "-q"], size: 128 << 20, sectorSize: 512)
        try require("touch", [mount.path("target")])
        try require("chattr", ["+C", mount.path("target")])
        // The target is empty in the first round and has content in the second.
        for _ in 0..<2 {
            try write(command, to: mount.path("target"))
            #expect(try Self.flags(mount.path("target")) == "C")
        }
        for option in ["nocow=on", "nocow"] {
            var words = command.words
            words.insert(contentsOf: ["-o", option], at: 1)
            try write(words.joined(separator: " "), to: mount.path(option))
            #expect(try Self.flags(mount.path(option)) == "C", "\(words)")
        }
    }
}
