import Foundation
import TestSupport
import Testing

/// Compatibility with qemu-img's command line: letters, order rules and exit codes.
@Suite struct CommandLineTests {
    let folder: TempFolder
    let sketch = DiskSketch("A-1b0+-", cluster: 65536)

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    /// The header of `target` in the test folder.
    private func headerOfTarget() throws -> Qcow2Fields {
        try Qcow2Fields(folder.path("target"))
    }

    @Test(arguments: [
        "-f raw -O raw source target",
        "source target -f raw -O raw",
        "source -f raw target -O raw",
        "-f raw source -O raw target",
        "-fraw -Oraw source target",
        "-O qcow2 -O raw source target",
        "-f qcow2 -f raw source target",
        "-m8 source target",
        "-m1 -W source target",
        "-m 64 source target",
        "-S4k source target",
        "-S 0 source target",
        "-S 0k source target",
        "-S 16M source target",
        "-S 4096 -S 64K source target",
        "-q source target",
        "-qW source target",
        "-Wqm 3 source target",
        "-U source target",
        "-t none -t writeback source target",
        "-T writethrough -T writeback source target",
        "-t unsafe -T unsafe source target",
        "-f raw -- source target",
    ])
    func makesTheSameRawDisk(_ line: String) throws {
        let outcome = try Swimg.convert(line.words, in: folder.path)
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil, "\(outcome)")
        #expect(folder.names == ["source", "target"])
    }

    @Test(arguments: [
        ("-O qcow2 source target", 3, 16),
        ("-Oqcow2 source target", 3, 16),
        ("source target -Oqcow2 -o compat=0.10", 2, 16),
        ("-O qcow2 -ocluster_size=4096 source target", 3, 12),
        ("-O raw -O qcow2 source target", 3, 16),
        ("-O qcow2 -o compat=0.10 -o cluster_size=4k source target", 2, 12),
        ("-O qcow2 -o cluster_size=4k,compat=0.10 source target", 2, 12),
        ("-O qcow2 -o compat=0.10,cluster_size=4k,compat=1.1 source target", 3, 12),
        ("-O qcow2 -o compat=v2 source target", 2, 16),
        ("-O qcow2 -o compat=v3 source target", 3, 16),
        ("-O qcow2 -o cluster_size=4k -o cluster_size=2M source target", 3, 21),
        ("-c -O qcow2 -o compression_type=zlib source target", 3, 16),
        ("-cWO qcow2 -o compression_type=zstd source target", 3, 16),
    ])
    func makesTheQcow2Asked(_ line: String, version: Int, clusterBits: Int) throws {
        let outcome = try Swimg.convert(line.words, in: folder.path)
        expectSuccess(outcome)
        let header = try headerOfTarget()
        #expect(header.version == version && header.clusterBits == clusterBits, "\(outcome)")
        #expect(header.virtualSize == Int64(sketch.size))
        #expect(header.compressionType == (line.contains("zstd") ? 1 : 0))
        let back = try Swimg.convert("-f", "qcow2", folder.path("target"), folder.path("back"))
        expectSuccess(back)
        #expect(
            try mismatch(contents(folder.path("back")), sketch.bytes) == nil, "\(outcome)\n\(back)")
    }

    @Test(arguments: [
        ("-m 0 source target", "64"),
        ("-m 65 source target", "64"),
        ("-m -1 source target", ""),
        ("-m many source target", ""),
        ("-m", ""),
        ("-S 1023x source target", ""),
        ("-S 511 source target", "512"),
        ("-S 16385k source target", ""),
        ("-S -1 source target", ""),
        ("-S", ""),
        ("-O nosuch source target", "nosuch"),
        ("-f nosuch source target", "nosuch"),
        ("-O vmdk source target", "vmdk"),
        ("-f vmdk source target", "vmdk"),
        ("-t fast source target", "fast"),
        ("-T fast source target", "fast"),
        ("-O qcow2 -o nosuch=1 source target", "nosuch"),
        ("-O qcow2 -o cluster_size=3 source target", "luster"),
        ("-O qcow2 -o cluster_size=4M source target", "luster"),
        ("-O qcow2 -o cluster_size=256 source target", "luster"),
        ("-O qcow2 -o cluster_size=65537 source target", "luster"),
        ("-O qcow2 -o compat=2.0 source target", "2.0"),
        ("-O qcow2 -o compression_type=lzma source target", "lzma"),
        ("-O qcow2 -o compat=0.10,compression_type=zstd source target", "compression"),
        ("-O raw -o cluster_size=65536 source target", "cluster_size"),
        ("-O qcow2 -n -o compat=1.1 source target", "-o"),
        ("-c -O raw source target", "ompress"),
        ("--target-is-zero source target", "-n"),
        ("-n source target", "target"),
        ("-B base -F raw source target", "acking"),
        ("-O raw -o backing_file=base source target", "backing_file"),
        ("-O qcow2 -B base source target", "format"),
        ("-O qcow2 -F raw source target", "acking"),
        ("-O qcow2 -B base -F raw source source target", "acking"),
        ("-O qcow2 -B base -F nosuch source target", "nosuch"),
        ("-O qcow2 -B nosuch -F raw source target", "nosuch"),
        ("missing target", "missing"),
        ("source missing target", "missing"),
        ("-f qcow2 source target", "qcow2"),
        ("source", ""),
        ("", ""),
        ("source no-such-folder/target", "no-such-folder/target"),
        ("source source/target", "source/target"),
    ])
    func refuses(_ line: String, says: String) throws {
        try writeFilled(folder.path("base"), byte: 1, count: 65536)
        let before = folder.names
        let outcome = try Swimg.convert(line.words, in: folder.path)
        expectRefusal(outcome, says: says)
        #expect(folder.names == before, "left behind by \(outcome)")
    }

    /// The word after a letter that takes a value is that value, whatever it looks like.
    @Test(arguments: [
        ("-f -qW", "-qW"), ("-f -q", "-q"), ("-f [", "["), ("-f --", "--"), ("-f -r", "-r"),
        ("-f --bitmaps", "--bitmaps"), ("-pf -qW", "-qW"), ("-f -qW -n", "-qW"),
    ])
    func takesTheNextWord(_ options: String, format: String) throws {
        let outcome = try Swimg.convert(options.words + ["source", "target"], in: folder.path)
        expectRefusal(outcome, says: "format '\(format)'")
        #expect(folder.names == ["source"], "left behind by \(outcome)")
    }

    /// The long names of QEMU 10.1, and the letters that changed there.
    @Test func longNames() throws {
        for line in [
            "create --format qcow2 --options cluster_size=4k --quiet base 1M",
            "create -f qcow2 --backing base -B qcow2 --quiet overlay",
            "convert --source-format raw --target-format qcow2 --target-format-options "
                + "cluster_size=4k --compress --parallel 2 --oob-writes --quiet source copy",
            "convert -f qcow2 -O qcow2 -b base --backing-format=qcow2 --target-cache none "
                + "--source-cache=writeback --sparse-size 8k overlay second",
            "check --format qcow2 --repair leaks --cache none --quiet copy",
            "compare --a-format raw --b-format qcow2 --quiet source copy",
            "rebase --format qcow2 --backing base --backing-format qcow2 --backing-unsafe second",
            "resize --format qcow2 --quiet base 2M", "snapshot --create s base",
            "snapshot --delete s --quiet base", "amend --options lazy_refcounts=on base",
            "commit --drop --base base --rate-limit 100M --quiet overlay",
            "dd --format qcow2 --output-format raw if=copy of=out",
        ] {
            let outcome = try run(Swimg.path, line.words, in: folder.path)
            #expect(outcome.isSuccess && outcome.output.isEmpty && outcome.errors.isEmpty)
        }
        let size = try require(Swimg.path, ["measure", "-s", "1M", "--target-format", "qcow2"])
        #expect(size.hasPrefix("required size: "))
    }

    /// Unsupported options are reported by name and never ignored, so that scripts notice.
    @Test(arguments: [
        ("--bitmaps source target", "lacks bitmap support"),
        ("--skip-broken-bitmaps source target", "--skip-broken-bitmaps"),
        ("-l x source target", "snapshot"), ("-l snapshot.x=y source target", "snapshot"),
        ("-r x source target", "rate limit"),
        ("-C -S 4k source target", "-C"), ("-C -c -O qcow2 source target", "-C"),
        ("--no-such-option source target", "--no-such-option"),
        ("-Z source target", "Z"),
    ])
    func namesTheOptionItLacks(_ line: String, says: String) throws {
        let outcome = try Swimg.convert(line.words, in: folder.path)
        expectRefusal(outcome, says: says)
        #expect(folder.names == ["source"], "left behind by \(outcome)")
    }

    @Test(arguments: [["--version"], ["--help"], ["convert", "--help"], ["-h"], ["-V"]])
    func describesItself(_ arguments: [String]) throws {
        let outcome = try run(Swimg.path, arguments)
        #expect(outcome.status == 0 && outcome.errors.isEmpty, "\(outcome)")
        let isVersion = arguments == ["--version"] || arguments == ["-V"]
        #expect(outcome.outputText.contains(isVersion ? " version " : "convert"), "\(outcome)")
    }

    /// Nova and Glance search the output for `qemu-img version ([0-9.]*)`.
    @Test func answersToTheNameItIsCalledBy() throws {
        let link = folder.path("qemu-img")
        try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: Swimg.path)
        let version = try run(link, ["--version"])
        #expect(version.outputText.hasPrefix("qemu-img version "), "\(version)")
        let digit = version.outputText.dropFirst("qemu-img version ".count).first
        #expect(digit?.isNumber ?? false, "\(version)")
        let refusal = try run(link, ["convert", "missing", "target"], in: folder.path)
        #expect(refusal.status == 1 && refusal.errorText.hasPrefix("qemu-img: "), "\(refusal)")
    }

    @Test(arguments: [[], ["nosuch"], ["nosuch", "a", "b"], ["--nosuch"]])
    func refusesOtherCommands(_ arguments: [String]) throws {
        let outcome = try run(Swimg.path, arguments)
        #expect(outcome.status == 1, "\(outcome)")
        #expect(!outcome.errors.isEmpty && outcome.output.isEmpty, "\(outcome)")
    }

    /// A closed standard output or standard error must not become the target's descriptor.
    @Test func convertsWithClosedStandardStreams() throws {
        let closing = "exec \"$1\" convert -f raw -O raw source target <&- >&- 2>&-"
        let outcome = try run("sh", ["-c", closing, "sh", Swimg.path], in: folder.path)
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil)
    }

    /// File names with dashes, spaces and special characters work.
    @Test(arguments: ["with space", "comma,file", "ünïcode", "percent%s", "quote'\"", "new\nline"])
    func takesOddNames(_ name: String) throws {
        try sketch.writeRaw(folder.path(name))
        let target = "to \(name)"
        let outcome = try Swimg.convert("-f", "raw", "-O", "qcow2", name, target, in: folder.path)
        expectSuccess(outcome)
        #expect(folder.names == ["source", name, target].sorted())
        // An error names the file, but on one line.
        let refusal = try Swimg.convert("-f", "qcow2", name, "out", in: folder.path)
        expectRefusal(refusal)
    }

    @Test func concatenatesSources() throws {
        var expected: [UInt8] = []
        for (name, count) in [("one", 65536), ("two", 513), ("three", 1)] {
            let bytes = noise(UInt64(count), count)
            _ = try folder.write(name, bytes)
            expected += bytes + [UInt8](repeating: 0, count: (512 - count % 512) % 512)
        }
        let raw = try Swimg.convert("-f", "raw", "one", "two", "three", "target", in: folder.path)
        expectSuccess(raw)
        #expect(try mismatch(contents(folder.path("target")), expected) == nil, "\(raw)")
        let qcow2 = try Swimg.convert(
            "-f", "raw", "-O", "qcow2", "-c", "three", "two", "one", "target2", in: folder.path)
        expectSuccess(qcow2)
        #expect(try Qcow2Fields(folder.path("target2")).virtualSize == Int64(expected.count))
    }
}
