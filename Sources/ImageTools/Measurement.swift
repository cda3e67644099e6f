import DiskImage
import ImageConvert
import ImageFormats
import ImageStorage
import NBDStorage

/// One `swimg measure`: how much space an image would take.
///
/// The numbers are qemu-img's: a conversion stores no more than `required`, and often less, for it leaves out the zeros
/// that only reading the data finds, and tables of what it does not store.
public struct Measurement: Sendable {
    public enum Disk: Sendable {
        /// A disk of this size in bytes, with nothing in it.
        case empty(Int64)
        /// An image (a path, or the name of an NBD export); a nil format is found out.
        case image(ImageName, ImageFormat?)
    }

    public struct Result: Sendable, Equatable {
        /// Of the file, in bytes, with what the disk holds.
        public var required: Int64
        /// With every cluster stored.
        public var fullyAllocated: Int64
        /// What the image's bitmaps would take in addition; nil where there cannot be any.
        public var bitmaps: Int64?
    }

    public var disk: Disk
    public var targetFormat = ImageFormat.raw
    public var options = CreationOptions()
    /// Read an image that somebody else writes to (`-U`).
    public var shareForced = false
    public var nbd = NBDOptions()
    /// The image as it was when this internal snapshot was taken (`-l`).
    public var snapshot: SnapshotName?

    public init(_ disk: Disk) { self.disk = disk }

    /// - Throws: `ImageError`.
    public func run() async throws -> Result {
        let parameters = try MeasureParameters(options, for: targetFormat)
        let image: OpenedImage?
        let size: Int64
        switch disk {
        case .empty(let bytes):
            image = nil
            size = try checkedDiskSize(bytes).roundedUp(to: guestSectorSize)
        case .image(let path, let format):
            var opener = ImageOpener(shareForced: shareForced, nbd: nbd)
            opener.snapshot = snapshot
            let opened = try await opener.open(path, format: format)
            image = opened
            size = opened.source.virtualSize.roundedUp(to: guestSectorSize)
        }
        switch targetFormat {
        case .raw: return Result(required: size, fullyAllocated: size, bitmaps: nil)
        case .qcow2: return try await qcow2Result(image, size, parameters)
        }
    }

    private func qcow2Result(
        _ image: OpenedImage?, _ size: Int64, _ parameters: MeasureParameters
    ) async throws -> Result {
        let file = parameters.file
        guard file.isAllowed(virtualSize: size) else {
            throw ImageError.invalid(
                "The image size is too large (try using a larger cluster size)")
        }
        let rounded = size.roundedUp(to: file.clusterSize)
        let data: Int64
        if parameters.allocatesAll {
            data = rounded
        } else if let image {
            // How much of it the backing file will share is not known.
            data =
                parameters.hasBacking ? rounded : try await allocatedData(image, file.clusterSize)
        } else {
            data = 0
        }
        let fullyAllocated = file.fullyAllocated(virtualSize: rounded)
        var bitmaps: Int64?
        if parameters.canHaveBitmaps, let source = image?.layers[0].qcow2 {
            bitmaps = try await source.bitmapsSize(clusterSize: file.clusterSize)
        }
        return Result(
            required: fullyAllocated - rounded + data, fullyAllocated: fullyAllocated,
            bitmaps: bitmaps)
    }

    /// How much of a disk is data, in whole clusters of the target, in bytes.
    private func allocatedData(_ image: OpenedImage, _ clusterSize: Int64) async throws -> Int64 {
        let reader = try await BlockStatusReader(image)
        var sum: Int64 = 0
        var position: Int64 = 0
        while position < reader.virtualSize {
            try Task.checkCancellation()
            let found = try await reader.status(at: position, limit: reader.virtualSize)
            position = found.range.upperBound
            if found.status.contains(.data), !found.status.contains(.zero) {
                position = position.roundedUp(to: clusterSize)
                sum += position - found.range.lowerBound.roundedDown(to: clusterSize)
            }
        }
        return sum
    }
}
