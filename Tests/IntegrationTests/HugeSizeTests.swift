import Foundation
import Glibc
import TestSupport
import Testing

/// Sizes near 2^63, where sums overflow: they must give one error line and never a crash.
@Suite(
    .enabled(if: MountedFolder.isUsable, "files of such sizes need a tmpfs, and that needs root"))
struct HugeSizeTests {
    /// The limit of qemu and of swimg, in bytes.
    static let largest: Int64 = .max - (1 << 30) + 1
    static let tooLarge: [Int64] = [.max, .max - 1, .max - 511, .max - 512, largest + 1]
    static let edges =
        tooLarge + [
            largest, largest - 1, largest - 511, 1 << 62, (1 << 61) + 1, 1 << 61, 1 << 32, 0,
        ]

    let mount: MountedFolder

    init() throws {
        mount = try MountedFolder(tmpfs: 32 << 20)
        try make("small", 1 << 20)
        for (name, options) in [
            ("plain", "cluster_size=64k"), ("large", "cluster_size=2M,refcount_bits=1"),
        ] {
            let words = ["create", "-q", "-f", "qcow2", "-o", options, mount.path(name), "1M"]
            try require(Swimg.path, words)
        }
    }

    private func make(_ name: String, _ size: Int64) throws {
        try newFile(mount.path(name)).truncate(atOffset: UInt64(size))
    }

    private func swimg(_ line: String) throws -> Outcome {
        try run(Swimg.path, line.words, in: mount.path)
    }

    private func expectTooLarge(_ outcome: Outcome, _ line: String) {
        #expect(outcome.status == (line.hasPrefix("compare") ? 2 : 1), "\(outcome)")
        #expect(outcome.output.isEmpty, "\(outcome)")
        expectOneErrorLine(outcome, says: "File too large")
    }

    /// Expects success or a refusal with one error line, but no signal.
    private func expectAnAnswer(_ outcome: Outcome) {
        #expect(outcome.status < 128, "\(outcome)")
        if outcome.status == 1 || !outcome.errors.isEmpty { expectOneErrorLine(outcome) }
    }

    @Test(arguments: [
        "info -f raw x", "info x", "map -f raw x", "map --output=picture -f raw x",
        "check -f raw x", "measure -f raw x", "measure -f raw -O qcow2 x", "digest -f raw x",
        "compare -f raw -F raw x small", "compare -f raw -F raw small x", "compare -s x x",
        "convert -f raw -O raw x out", "convert -f raw -O qcow2 x out", "convert -c -O qcow2 x out",
        "convert -n -f raw -O raw small x", "convert -f raw -O raw small x small out",
        "convert -O qcow2 -B x -F raw small out", "create -f qcow2 -b x -F raw out",
        "resize -f raw x +1", "resize -f raw --shrink x -1", "resize -f raw --shrink x 5",
        "dd -f raw if=x of=out bs=512 count=1", "dd if=x of=out skip=18014398509481983",
        "info --image-opts driver=raw,offset=512,file.filename=x",
    ])
    func aFile(_ line: String) throws {
        for size in Self.tooLarge {
            try make("x", size)
            expectTooLarge(try swimg(line), line)
            #expect(FileStatus(mount.path("x"))?.size == size, "\(line)")
            #expect(FileStatus(mount.path("out")) == nil, "\(line)")
        }
    }

    @Test(
        .enabled(if: hasProgram("nbdkit")),
        arguments: [
            "info EXPORT", "map EXPORT", "measure EXPORT", "digest EXPORT",
            "compare EXPORT small", "compare small EXPORT", "convert EXPORT out",
            "convert -n -f raw -O raw small EXPORT", "create -f raw EXPORT 1M",
        ])
    func anExport(_ line: String) throws {
        // Not the mounted folder: a server that ends later would keep it busy.
        let folder = try TempFolder()
        try newFile(folder.path("small")).truncate(atOffset: 1 << 20)
        for size in [.max, Self.largest + 1] {
            let server = "[ nbdkit null \(size) ]"
            let words = line.replacingOccurrences(of: "EXPORT", with: server).words
            let outcome = try run(Swimg.path, words, in: folder.path)
            #expect(outcome.errorText.contains("cannot open: File too large"), "\(outcome)")
            #expect(outcome.status == (line.hasPrefix("compare") ? 2 : 1), "\(outcome)")
        }
        // The end of an export of the largest size.
        let last = "[ nbdkit null \(Self.largest) ]"
        let map = try run(
            Swimg.path, "map --output=json -s \(Self.largest - 1024) \(last)".words,
            in: folder.path)
        #expect(map.isSuccess && map.outputText.contains("\"length\": 1024"), "\(map)")
    }

    @Test func theLargestOfAll() throws {
        try make("x", Self.largest)
        for line in [
            "info -f raw x", "map -f raw x", "map --output=json -f raw x", "measure -f raw x",
            "map --output=picture -f raw x", "map --output=picture --svg picture -f raw x",
            "compare -f raw -F raw x x", "convert -n -f raw -O raw small x",
            "dd -f raw if=x of=out bs=1M skip=8796093021183", "resize -f raw --shrink x -1G",
        ] {
            let outcome = try swimg(line)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
        // tmpfs would let the file grow to a size at which it cannot be opened again.
        try make("x", Self.largest)
        for change in ["+1", "+1G", "+8E", "\(Int64.max)"] {
            let line = "resize -f raw x \(change)"
            expectAnAnswer(try swimg(line))
            #expect(FileStatus(mount.path("x"))?.size == Self.largest, "\(line)")
        }
        expectTooLarge(try swimg("convert -f raw -O raw x small out"), "")
        expectTooLarge(try swimg("create -f raw out \(Self.largest + 1)"), "")
        expectTooLarge(try swimg("measure --size \(Self.largest + 1)"), "")
        expectTooLarge(try swimg("convert -O qcow2 -o size=\(Int64.max) small out"), "")
        #expect(try swimg("create -q -f raw out \(Self.largest)").isSuccess)
    }

    @Test(arguments: [
        "create -q -f raw out N", "create -q -f qcow2 out N", "create -q -f raw -o size=N out",
        "create -q -f qcow2 -o cluster_size=2M out N", "create -q -f qcow2 -u -b none -F raw out N",
        "create -q -f raw -o preallocation=falloc out N",
        "create -q -f qcow2 -o cluster_size=2M,preallocation=falloc out N",
        "convert -O raw -o size=N small out",
        "convert -O qcow2 -o cluster_size=2M,size=N small out",
        "convert -O raw -S N small out", "measure --size N", "measure -O qcow2 --size N",
        "measure -O qcow2 -o cluster_size=2M,refcount_bits=64 --size N",
        "measure -O qcow2 -o cluster_size=N small", "measure -O qcow2 -o refcount_bits=N small",
        "resize -q --shrink -f raw small N", "resize -q -f raw small +N",
        "resize -q --shrink plain -N",
        "resize -q --shrink plain N", "resize -q plain +N", "resize -q large +N",
        "resize -q --preallocation=falloc large +N",
        "map -f raw -s N small", "map -f raw -l N small", "map --output=json -s N -l N plain",
        "map --output=picture -s N plain", "map --output=picture -l N plain",
        "dd if=small of=out bs=N", "dd if=small of=out count=N", "dd if=small of=out skip=N",
        "dd if=small of=out bs=2147483647 count=N skip=N",
        "info --image-opts driver=raw,offset=N,file.filename=small",
        "info --image-opts driver=raw,offset=N,size=N,file.filename=small",
        "info --image-opts driver=raw,size=N,file.driver=raw,file.offset=N,file.file.filename=small",
    ])
    func aNumberOfTheCommandLine(_ line: String) throws {
        for size in Self.edges {
            // Skipped: a disk that is much longer than its source takes too long.
            if line.contains(",size=N") || line.contains(" size=N small"), size >= 1 << 61,
                size <= Self.largest
            {
                continue
            }
            let words = line.words.map { $0.replacingOccurrences(of: "N", with: "\(size)") }
            expectAnAnswer(try run(Swimg.path, words, in: mount.path))
            unlink(mount.path("out"))
        }
    }

    @Test(arguments: [
        "info x", "map --output=json x", "check x", "measure -O qcow2 x", "compare x plain",
        "convert -O raw x out", "convert -O qcow2 x out", "resize -q x +512", "resize -q x 2M",
        "convert -n -O qcow2 small x", "create -q -f qcow2 -b x -F qcow2 out", "digest x",
    ])
    func aHeader(_ line: String) throws {
        for name in ["plain", "large"] {
            for size in [.max, Self.largest + 1, Self.largest, 1 << 61] as [Int64] {
                let image = mount.path("x")
                try? FileManager.default.removeItem(atPath: image)
                try FileManager.default.copyItem(atPath: mount.path(name), toPath: image)
                try Qcow2Patcher(image).setWord(24, UInt64(size))
                expectAnAnswer(try swimg(line))
                unlink(mount.path("out"))
            }
        }
    }

    /// A refcount table can count more clusters than a file can have bytes.
    @Test func aRefcountTable() throws {
        let image = try Qcow2Patcher(mount.path("large"))
        let block = try image.word(image.refcountTable)
        try image.write([0, 0, 0, 4], at: 56)
        try image.setWord(image.refcountTable + 4 * image.clusterSize - 8, block)
        expectRefusal(try swimg("resize -q large +1T"), says: "shares the cluster")
    }
}
