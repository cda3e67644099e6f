import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg measure`: calculates how much space an image would take.
///
/// The numbers are qemu-img's. A conversion stores at most `required` bytes, and often fewer: it
/// omits zeros that only reading the data finds, and the tables for them.
public struct Measurement: Sendable {
    public enum Disk: Sendable {
        /// An empty disk of this size in bytes.
        case empty(Int64)
        /// An image; a nil format is detected.
        case image(ImageName, ImageFormat?)
    }

    public var disk: Disk
    public var targetFormat = ImageFormat.raw
    public var options = CreationOptions()
    public var access = StorageAccess()
    /// Measures the disk as this internal snapshot recorded it (`-l`).
    public var snapshot: SnapshotName?

    public init(_ disk: Disk) { self.disk = disk }

    /// - Throws: `ImageError`.
    public func run() async throws -> MeasuredSize {
        let typed = try TypedOptions(options, for: targetFormat)
        return try await targetFormat.creator().measure(try await measuredDisk(), typed)
    }

    private func measuredDisk() async throws -> MeasuredDisk {
        switch disk {
        case .empty(let bytes):
            return MeasuredDisk(
                emptyOfSize: try bytes.checkedAsDiskSize().roundedUp(to: guestSectorSize))
        case .image(let path, let format):
            var opener = ImageOpener(access)
            opener.snapshot = snapshot
            let image = try await opener.open(path, format: format)
            return MeasuredDisk(
                size: image.source.virtualSize.roundedUp(to: guestSectorSize),
                allocatedData: { try await Self.allocatedData(image, $0) },
                bitmapsSize: { try await image.topLayer.bitmapsSize(clusterSize: $0) })
        }
    }

    /// The data of a disk in bytes, rounded to whole clusters of the target.
    private static func allocatedData(
        _ image: OpenedImage, _ clusterSize: Int64
    ) async throws -> Int64 {
        let disk = LayeredSource(layers: image.layers.map(\.image))
        var walk = MappingWalk(disk, holes: .asQemu)
        var sum: Int64 = 0
        var position: Int64 = 0
        while position < disk.virtualSize {
            guard let mapping = walk.known(at: position, limit: disk.virtualSize) else {
                try Task.checkCancellation()
                try await walk.load(at: position, limit: disk.virtualSize)
                continue
            }
            position = mapping.range.upperBound
            // Clusters that are missing are zeros to qemu, and what is marked is no data.
            if mapping.needsReading, ![.missing, .marked].contains(mapping.content) {
                position = min(position.roundedUp(to: clusterSize), disk.virtualSize)
                sum +=
                    position.roundedUp(to: clusterSize)
                    - mapping.range.lowerBound.roundedDown(to: clusterSize)
            }
        }
        return sum
    }
}
