import Concurrency
import DiskImage

/// A disk of zeros that forgets what is written to it, to measure everything but the storage. qemu
/// calls it `null-co`.
public final class NullStorage: WritableStorage {
    public let name: String
    public let size: Int64
    public let traits = StorageTraits(isDevice: true, isRemote: true, hasHoles: true)
    public var allocatedSize: Int64? { 0 }
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()

    /// - Parameter size: size of the disk in bytes.
    public init(name: String, size: Int64) {
        self.name = name
        self.size = size
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        guard end <= size else { throw ImageError.beyondEnd(self, offset..<end) }
        buffer.zeroFill()
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        Extent(range: offset..<limit, isHole: true)
    }

    public func write(_ bytes: RawSpan, at offset: Int64) async throws {
        try requireRoom(offset + Int64(bytes.byteCount))
    }

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        try requireRoom(range.upperBound)
    }

    public func truncate(to size: Int64) async throws { try requireRoom(size) }

    public func requireSpace(_ bytes: Int64) throws {}

    public func flush() async throws {}

    private func requireRoom(_ end: Int64) throws(ImageError) {
        guard end <= size else {
            throw ImageError(
                .invalid, path: name, "is too small: \(size) bytes, and \(end) are needed")
        }
    }
}

/// The driver of `null-co` and `null-aio`, with a `size`, and of names with `null-co://` and
/// `null-aio://`.
public struct NullDriver: StorageDriver {
    public let label = "null-co"
    public let names = ["null-co", "null-aio"]

    private static let schemes = ["null-co://", "null-aio://"].map { Array($0.utf8) }
    /// qemu's default size in bytes.
    private static let usualSize: Int64 = 1 << 30

    public init() {}

    public func claims(_ name: ImageName, isTyped: Bool) -> Bool {
        Self.schemes.contains { name.bytes.starts(with: $0) }
    }

    /// Puts the size behind the scheme, because a name is all that `openSource` gets.
    public func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName {
        let size = try options.size(prefix + "size").map { "\($0)" } ?? ""
        _ = options.take(prefix + "read-zeroes")
        return ImageName("\(options.driver)://\(size)")
    }

    public func shownName(_ name: ImageName) -> String {
        "\(name.protocolName ?? "null-co")://"
    }

    public func hasPlainName(describedBy options: [String: OptionValue]) -> Bool {
        options.isEmpty
    }

    private func size(_ name: ImageName) throws(ImageError) -> Int64 {
        let text = name.description.split(separator: "://", maxSplits: 1).dropFirst().first
        guard let text else { return Self.usualSize }
        guard let size = Int64(text) else {
            throw .invalid("'\(name)' has no size in bytes behind \(shownName(name))")
        }
        return try size.checkedAsDiskSize()
    }

    public func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage {
        NullStorage(name: name.description, size: try size(name))
    }

    public func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget {
        // An image that is kept nowhere must be meant: `-n`.
        guard request.manner == .writeInto else {
            throw .unsupported(
                name.description,
                "Protocol driver '\(name.protocolName ?? label)' does not support image creation")
        }
        return TargetInPlace(NullStorage(name: name.description, size: try size(name)))
    }
}
