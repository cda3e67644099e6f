import Testing

@testable import DiskImage

@Suite struct ImageNameTests {
    @Test(arguments: [
        ("nbd://host", "nbd"), ("host_device:x", "host_device"), (":x", ""), ("q q:c", "q q"),
        ("json:{}", "json"),
    ])
    func namesAProtocol(_ name: String, _ scheme: String) {
        #expect(ImageName(name).protocolName == scheme)
        #expect(throws: ImageError.self) { try ImageName(name).path() }
    }

    @Test(arguments: [
        ("disk.raw", "disk.raw"), ("./a:b", "./a:b"), ("/x/nbd://y", "/x/nbd://y"), ("", ""),
        ("file:a:b", "a:b"), ("file:/x", "/x"), ("file:", ""), ("file:file:x", "file:x"),
    ])
    func namesAFile(_ name: String, _ path: String) throws {
        #expect(try ImageName(name).path() == HostPath(path))
    }

    @Test func pathsAreNeverTakenForProtocols() throws {
        for path in ["a:b", "/a:b", "file:x", "x", "json:{}"] as [HostPath] {
            let back = try path.name.path()
            #expect(back == path || back.bytes == Array("./".utf8) + path.bytes)
            #expect(path.name.protocolName == nil)
        }
        #expect(ImageName("file:a:b").withoutFilePrefix == "./a:b")
        #expect(ImageName("file:x").withoutFilePrefix == "x")
        #expect(ImageName("nbd://x").withoutFilePrefix == "nbd://x")
    }

    @Test func aZeroByteIsNoFilesName() {
        #expect(throws: ImageError.self) { try ImageName("a\0b").path() }
    }

    @Test func pathsAreCutAtSlashesOnly() {
        // A combining mark after a slash makes one character of both.
        let path: HostPath = "m/\u{301}x/\u{301}y.raw"
        #expect(path.folder == "m/\u{301}x" && path.fileName == Array("\u{301}y.raw".utf8))
        #expect(path.resolving("\u{301}z") == "m/\u{301}x/\u{301}z")
        #expect(path.resolving("/z") == "/z")
        #expect(HostPath("x").folder == "." && HostPath("/x").folder == "/")
        #expect(HostPath("x").resolving("y:z") == "y:z" && HostPath("x/").fileName.isEmpty)
    }

    @Test func bytesStayAsTheyAre() throws {
        let bytes: [UInt8] = [0x6f, 0xe8, 0x2f, 0xff]
        let path = try ImageName(bytes: bytes).path()
        let copy = path.withCString { start in
            bytes.indices.map { UInt8(bitPattern: start[$0]) }
        }
        #expect(copy == bytes && path.name.bytes == bytes)
        // Equal as text, but two names for the kernel.
        #expect(ImageName("\u{e9}") != ImageName("e\u{301}"))
    }
}
