import Foundation

/// The qcow2 header fields that tests inspect, read without the code under test.
public struct Qcow2Fields: Sendable {
    public let version: Int
    public let clusterBits: Int
    public let virtualSize: Int64
    public let compressionType: Int
    public let refcountOrder: Int
    public let extendedL2: Bool
    public let compatibleFeatures: UInt64
    public let backingFile: String?
    /// Offset in bytes of the bitmap directory; 0 if there is none.
    public let bitmapDirectory: Int

    public init(_ path: String) throws {
        let bytes = [UInt8](try contents(path).prefix(4096))
        func number(_ at: Int, _ count: Int) -> UInt64 {
            bytes[at..<at + count].reduce(0) { $0 << 8 | UInt64($1) }
        }
        guard bytes.count >= 112, number(0, 4) == 0x5146_49fb else {
            throw CommandError(description: "\(path): no qcow2 header")
        }
        version = Int(number(4, 4))
        clusterBits = Int(number(20, 4))
        virtualSize = Int64(number(24, 8))
        refcountOrder = version >= 3 ? Int(number(96, 4)) : 4
        compressionType = version >= 3 && number(100, 4) > 104 ? Int(bytes[104]) : 0
        extendedL2 = version >= 3 && number(72, 8) & 16 != 0
        compatibleFeatures = version >= 3 ? number(80, 8) : 0
        var position = version >= 3 ? Int(number(100, 4)) : 72
        var directory = 0
        while position + 8 <= bytes.count, number(position, 4) != 0 {
            if number(position, 4) == 0x2385_2875 { directory = Int(number(position + 24, 8)) }
            position += 8 + (Int(number(position + 4, 4)) + 7) / 8 * 8
        }
        bitmapDirectory = directory
        let name = Int(number(8, 8))
        let length = Int(number(16, 4))
        backingFile =
            name == 0 ? nil : String(decoding: bytes[name..<name + length], as: UTF8.self)
    }
}
