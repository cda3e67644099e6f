import Foundation
import Glibc

/// A temporary folder for one test, removed with its content when the last reference is released.
public final class TempFolder: Sendable {
    public let path: String

    public init(under parent: String? = nil) throws {
        let parent = parent ?? ProcessInfo.processInfo.environment["TMPDIR"] ?? "/tmp"
        var template = Array("\(parent)/swimg-test-\(String(repeating: "X", count: 6))".utf8CString)
        guard mkdtemp(&template) != nil else {
            throw CommandError(
                description: "mkdtemp in \(parent): \(String(cString: strerror(errno)))")
        }
        path = String(decoding: template.dropLast().map(UInt8.init(bitPattern:)), as: UTF8.self)
    }

    /// Makes a folder with copies of another one's files.
    public convenience init(copying other: TempFolder) throws {
        try self.init()
        for name in other.names {
            try FileManager.default.copyItem(atPath: other.path(name), toPath: path(name))
        }
    }

    deinit {
        try? FileManager.default.removeItem(atPath: path)
    }

    public func path(_ name: String) -> String { "\(path)/\(name)" }

    public func write(_ name: String, _ bytes: [UInt8]) throws -> String {
        try Data(bytes).write(to: URL(fileURLWithPath: path(name)))
        return path(name)
    }

    public func makeFolder(_ name: String) throws -> String {
        try FileManager.default.createDirectory(
            atPath: path(name), withIntermediateDirectories: true)
        return path(name)
    }

    /// The names in the folder, sorted, so that tests can check for unexpected files.
    public var names: [String] { Self.names(in: path) }

    public static func names(in folder: String) -> [String] {
        ((try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []).sorted()
    }
}

/// The `stat` fields of a path that tests use.
public struct FileStatus: Equatable, Sendable {
    public let inode: UInt64
    public let mode: UInt32
    public let owner: UInt32
    public let group: UInt32
    public let size: Int64
    /// Space in bytes that the file takes on its file system.
    public let allocated: Int64

    public init?(_ path: String, followLinks: Bool = true) {
        var status = stat()
        guard (followLinks ? stat(path, &status) : lstat(path, &status)) == 0 else { return nil }
        inode = UInt64(status.st_ino)
        mode = status.st_mode
        owner = status.st_uid
        group = status.st_gid
        size = Int64(status.st_size)
        // With delayed allocation a file that was just written may not have its blocks yet.
        allocated = Int64(status.st_blocks) * 512
    }
}

/// Creates or empties a file and opens it for reading and writing.
public func newFile(_ path: String) throws -> FileHandle {
    let descriptor = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else {
        throw CommandError(description: "\(path): \(String(cString: strerror(errno)))")
    }
    return FileHandle(fileDescriptor: descriptor, closeOnDealloc: true)
}

public func contents(_ path: String) throws -> Data {
    try Data(contentsOf: URL(fileURLWithPath: path))
}

/// The bytes `offset ..< offset + count` of a file or a device.
public func contents(_ path: String, at offset: Int64, count: Int) throws -> [UInt8] {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else {
        throw CommandError(description: "\(path): \(String(cString: strerror(errno)))")
    }
    defer { close(descriptor) }
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
        let got = bytes.withUnsafeMutableBytes {
            pread(descriptor, $0.baseAddress! + done, count - done, off_t(offset) + off_t(done))
        }
        guard got > 0 else {
            throw CommandError(description: "\(path): short read at \(offset + Int64(done))")
        }
        done += got
    }
    return bytes
}

/// Describes the first difference of two byte strings; nil if they are equal.
///
/// Tests expect nil from this function instead of comparing the bytes: for unequal collections
/// Swift Testing computes an edit script, which takes hours for a megabyte.
public func mismatch(_ one: some ContiguousBytes, _ other: some ContiguousBytes) -> String? {
    one.withUnsafeBytes { one in
        other.withUnsafeBytes { other in
            let shared = min(one.count, other.count)
            let lengths = "\(one.count) and \(other.count) bytes"
            let same = one.baseAddress.flatMap { one in
                other.baseAddress.map { other in memcmp(one, other, shared) == 0 }
            }
            if shared == 0 || same == true {
                return one.count == other.count ? nil : "\(lengths), the same as far as both go"
            }
            let first = (0..<shared).first { one[$0] != other[$0] } ?? 0
            return "\(lengths), which differ first at offset \(first)"
        }
    }
}

/// The SHA-256 of a file in hexadecimal, computed by coreutils.
public func sha256(_ path: String) throws -> String {
    String(try require("sha256sum", ["--", path]).drop { $0 == "\\" }.prefix(64))
}

/// The block hash of a file in the form of `swimg digest`, computed from the definition.
public func blkhash(_ path: String) throws -> String {
    let program = """
        import hashlib, sys
        outer, length = hashlib.sha256(), 0
        with open(sys.argv[1], "rb") as disk:
            while block := disk.read(65536):
                outer.update(hashlib.sha256(block).digest())
                length += len(block)
        outer.update(length.to_bytes(8, "little"))
        print("blkhash:" + outer.hexdigest())
        """
    return String(try require("python3", ["-c", program, path]).prefix { !$0.isWhitespace })
}
