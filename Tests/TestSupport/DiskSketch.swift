import Foundation
import Glibc

/// A disk stated as a value, with one letter for each cluster, as in ovirt-imageio's tests.
///
/// - `A`...`Z`: sectors that all differ and compress well
/// - `1`...`9`: bytes that do not compress
/// - `a`...`z`: data in the first half, zeros in the second
/// - `+`: zeros except for the last byte
/// - `0`: zeros that are written
/// - `-`: a hole
public struct DiskSketch: Sendable, CustomStringConvertible {
    public let letters: [Character]
    public let cluster: Int
    public let size: Int

    /// `size` is in bytes; it cuts the last cluster short or lengthens the disk with a hole.
    public init(_ letters: String, cluster: Int = 65536, size: Int? = nil) {
        self.letters = letters.filter { $0 != " " }.map { $0 }
        self.cluster = cluster
        self.size = size ?? self.letters.count * cluster
    }

    /// 9.5 MiB and a sector of all kinds: several chunks and requests, none of which ends with it.
    public static let oddlySized = DiskSketch(
        "A1-aB2+0C" + String(repeating: "3--d4E", count: 12) + "F", cluster: 131072,
        size: 9_961_472 + 512)

    public var description: String { "\(String(letters)) x \(cluster), \(size) bytes" }

    /// The content of one whole cluster.
    private func content(_ index: Int) -> [UInt8] {
        let letter = letters[index]
        let zeros = [UInt8](repeating: 0, count: cluster)
        switch letter {
        case "-", "0": return zeros
        case "+": return zeros.dropLast() + [1]
        case "1"..."9": return noise(UInt64(index) << 8 | UInt64(letter.asciiValue!), cluster)
        case "a"..."z":
            let half = cluster / 2
            return sectors(letter, first: index * cluster / 512, count: half / 512)
                + zeros.prefix(half)
        default: return sectors(letter, first: index * cluster / 512, count: cluster / 512)
        }
    }

    public var bytes: [UInt8] {
        var all: [UInt8] = []
        for index in letters.indices { all += content(index) }
        all += [UInt8](repeating: 0, count: max(0, size - all.count))
        return Array(all.prefix(size))
    }

    /// Writes a raw file in which `-` clusters are holes.
    @discardableResult
    public func writeRaw(_ path: String) throws -> String {
        let file = try newFile(path)
        defer { try? file.close() }
        for index in letters.indices where letters[index] != "-" && index * cluster < size {
            try file.seek(toOffset: UInt64(index * cluster))
            try file.write(contentsOf: content(index).prefix(size - index * cluster))
        }
        try file.truncate(atOffset: UInt64(size))
        return path
    }

    /// Makes a qcow2 image with qemu-img; written zeros become zero clusters if the version has
    /// them.
    @discardableResult
    public func writeQcow2(
        _ path: String, options: String = "", compress: Bool = false
    ) throws -> String {
        let raw = path + ".sketch"
        try writeRaw(raw)
        defer { unlink(raw) }
        try Qemu.img(
            "convert", compress ? "-c" : "-q", "-f", "raw", "-O", "qcow2", "-o",
            "compat=1.1" + (options.isEmpty ? "" : ",\(options)"), raw, path)
        let end = (size + 511) / 512 * 512
        let zeros = letters.indices.filter { letters[$0] == "0" && $0 * cluster < end }
        try Qemu.io(
            "qcow2", path,
            zeros.map { "write -z \($0 * cluster) \(min(cluster, end - $0 * cluster))" })
        return path
    }
}

/// Writes a raw file of `count` incompressible bytes quickly, by repeating one block.
public func writeNoise(_ path: String, count: Int, seed: UInt64 = 1) throws {
    let block = noise(seed, min(count, 4 << 20))
    let file = try newFile(path)
    defer { try? file.close() }
    var left = count
    while left > 0 {
        try file.write(contentsOf: block.prefix(left))
        left -= min(left, block.count)
    }
}

public func writeFilled(_ path: String, byte: UInt8, count: Int) throws {
    try Data(repeating: byte, count: count).write(to: URL(fileURLWithPath: path))
}

/// A 512 MiB file that does not compress: compressing it on one thread takes long enough for a test
/// to interrupt. Made once and removed at exit.
public enum LargeDisk {
    public static func path() throws -> String { try made.get() }

    private static let made = Result { () throws -> String in
        // The path of a new unique folder plus a suffix is unique as well.
        let path = try TempFolder().path + ".large"
        try writeNoise(path, count: 512 << 20)
        removeAtExit(path)
        return path
    }
}
