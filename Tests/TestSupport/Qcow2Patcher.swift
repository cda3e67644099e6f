import Foundation
import Glibc

/// Damages a qcow2 image at chosen offsets, based on the specification alone.
public struct Qcow2Patcher {
    public let clusterSize: Int
    public let version: Int
    public let hasExtendedL2: Bool
    public let refcountTable: Int
    public let l1: Int
    private let refcountBits: Int
    private let path: String

    public init(_ path: String) throws {
        self.path = path
        let fields = try Qcow2Fields(path)
        version = fields.version
        clusterSize = 1 << fields.clusterBits
        refcountBits = 1 << fields.refcountOrder
        hasExtendedL2 = fields.extendedL2
        refcountTable = Int(try Self.word(path, 48))
        l1 = Int(try Self.word(path, 40))
    }

    public var fileSize: Int { FileStatus(path).map { Int($0.size) } ?? 0 }

    public func word(_ offset: Int) throws -> UInt64 { try Self.word(path, offset) }

    private static func word(_ path: String, _ offset: Int) throws -> UInt64 {
        try contents(path, at: Int64(offset), count: 8).reduce(0) { $0 << 8 | UInt64($1) }
    }

    public func write(_ bytes: [UInt8], at offset: Int) throws {
        guard let file = FileHandle(forUpdatingAtPath: path) else {
            throw CommandError(description: "cannot open \(path)")
        }
        defer { try? file.close() }
        try file.seek(toOffset: UInt64(offset))
        try file.write(contentsOf: Data(bytes))
    }

    public func setWord(_ offset: Int, _ value: UInt64) throws {
        try write(
            (0..<8).map { UInt8(truncatingIfNeeded: value >> (56 - 8 * UInt64($0))) }, at: offset)
    }

    /// Changes the 64-bit word at an offset in bytes.
    public func change(_ offset: Int, _ body: (UInt64) -> UInt64) throws {
        try setWord(offset, body(try word(offset)))
    }

    /// Offset in bytes of an entry of the first L2 table.
    public func l2Entry(_ index: Int) throws -> Int {
        let table = Int(try word(l1) & 0x00ff_ffff_ffff_fe00)
        return table + index * (hasExtendedL2 ? 16 : 8)
    }

    /// Sets the refcount of a cluster, limited to the maximum of its width.
    public func setRefcount(_ cluster: Int, _ value: Int) throws {
        let perBlock = clusterSize * 8 / refcountBits
        let block = Int(try word(refcountTable + cluster / perBlock * 8))
        let bit = cluster % perBlock * refcountBits
        if refcountBits >= 8 {
            let size = refcountBits / 8
            let bytes = (0..<size).map { $0 < size - 1 ? 0 : UInt8(min(value, 255)) }
            return try write(bytes, at: block + bit / 8)
        }
        let mask = (1 << refcountBits) - 1
        let old = Int(try contents(path, at: Int64(block + bit / 8), count: 1)[0])
        let new = old & ~(mask << (bit % 8)) | min(value, mask) << (bit % 8)
        try write([UInt8(new)], at: block + bit / 8)
    }

    public func truncate(to size: Int) throws {
        guard Glibc.truncate(path, size) == 0 else {
            throw CommandError(description: "cannot truncate \(path)")
        }
    }
}
