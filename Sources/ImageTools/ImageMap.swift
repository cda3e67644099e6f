import DiskImage
import ImageDrivers
import ImageFormats

/// The terms of qemu-img's `map`. The layer is the depth of the image in the chain: 0 is the image
/// itself.
extension Mapping {
    var isPresent: Bool { content != .unallocated && content != .marked }
    var isZero: Bool { !needsReading || content == .missing }
    /// Clusters that are missing count as allocated ahead of their data.
    var isData: Bool {
        switch content {
        case .data, .encrypted, .compressed, .preallocated, .missing: true
        case .marked, .zero, .hole, .unallocated: false
        }
    }
    /// Offset in that image's file, in bytes; nil if the range has none at which its bytes could be
    /// read.
    var hostOffset: Int64? {
        switch content {
        case .compressed, .encrypted, .marked: nil
        default: host?.lowerBound
        }
    }

    fileprivate mutating func moveHost(by distance: Int64) {
        guard distance > 0, let old = host else { return }
        host = old.lowerBound + distance..<old.upperBound + distance
    }

    /// Whether both have the same properties and are adjacent on the disk and in the file.
    func isContinued(by next: Mapping) -> Bool {
        guard layer == next.layer, isPresent == next.isPresent, isZero == next.isZero,
            isData == next.isData
        else { return false }
        switch (hostOffset, next.hostOffset) {
        case (nil, nil): return true
        case (let host?, let nextHost?): return host + Int64(range.count) == nextHost
        default: return false
        }
    }
}

/// Walks over a guest disk through the whole chain of images and reports each range.
///
/// Memory holds one entry at a time, whatever the size of the image.
public struct ImageMap: Sendable {
    public let layers: [OpenedLayer]

    /// - Parameter layers: the chain, beginning with the image itself; not empty.
    public init(_ layers: [OpenedLayer]) {
        precondition(!layers.isEmpty)
        self.layers = layers
    }

    /// Names of the files with the data in qemu's form, by depth.
    public var fileNames: [String] { layers.map(\.fileName) }

    /// Size of the guest disk in bytes.
    public var guestSize: Int64 { layers[0].image.guestSize }

    /// Calls `body` for each range of the disk, front to back without gaps, each as long as
    /// possible.
    ///
    /// - Parameter range: guest offsets in bytes; clipped to the end of the disk.
    /// - Throws: `ImageError` for damaged tables, what `body` throws, `CancellationError`.
    public func forEachMapping(
        in range: Range<Int64>, _ body: (Mapping) throws -> Void
    ) async throws {
        var walk = MappingWalk(
            LayeredSource(wholeSectorsOf: layers.map(\.image)), holes: .asQemu)
        let end = min(range.upperBound, guestSize)
        let offsets = layers.map(\.shownOffset)
        var position = range.lowerBound
        var current: Mapping?
        while position < end {
            guard var next = walk.known(at: position, limit: end) else {
                try Task.checkCancellation()
                do {
                    try await walk.load(at: position, limit: end)
                } catch {
                    if let current { try body(current) }
                    throw error
                }
                continue
            }
            position = next.range.upperBound
            next.moveHost(by: offsets[next.layer])
            if let known = current, known.isContinued(by: next) {
                current?.range = known.range.lowerBound..<position
            } else {
                if let known = current { try body(known) }
                current = next
            }
        }
        if let current { try body(current) }
    }
}
