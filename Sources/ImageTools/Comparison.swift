import Concurrency
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg compare`: whether two images hold the same guest disk.
///
/// Cells of the disk are compared by several workers at once, each cell front to back, and no cell is begun behind a
/// difference that is known: so the first difference is the one with the lowest offset, however the workers run.
public struct Comparison: Sendable {
    /// Paths, or names that a driver of `Storages` claims.
    public var first: ImageName
    public var second: ImageName
    /// nil finds it out from the first bytes.
    public var firstFormat: ImageFormat?
    public var secondFormat: ImageFormat?
    /// Sizes and block status have to be the same, too (`-s`).
    public var isStrict = false
    public var access = StorageAccess()
    /// Told how far the comparison is, in bytes of the larger guest disk, from any task.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    private static let workers = 8
    /// A worker compares so much at once where copying is the work, in bytes: both pieces stay in
    /// the cache of its core.
    private static let pieceSize: Int64 = 128 << 10
    /// The limit for all buffers, in bytes.
    private static let memory: Int64 = 64 << 20

    public init(_ first: ImageName, _ second: ImageName) {
        self.first = first
        self.second = second
    }

    public enum Difference: Sendable, Equatable {
        /// Of the guest disks' sizes; counts in strict mode only.
        case size
        /// Guest offset in bytes; strict mode only.
        case blockStatus(at: Int64)
        /// Guest offset in bytes of the first sector that differs, from the start of what was compared.
        case content(at: Int64)
    }

    public struct Result: Sendable, Equatable {
        /// nil: the images are the same.
        public var difference: Difference?
        /// Of the guest disks, in bytes, as whole sectors. Zeros are compared with what only one disk has.
        public var firstSize: Int64
        public var secondSize: Int64
    }

    /// What could not be done, where callers tell the cases apart.
    public struct Failure: Error {
        public enum Step: Sendable { case opening, blockStatus, reading }

        public var step: Step
        public var cause: ImageError

        public init(_ step: Step, _ cause: ImageError) {
            self.step = step
            self.cause = cause
        }
    }

    /// - Throws: `Failure`, or `CancellationError` if the task was cancelled.
    public func run() async throws -> Result {
        let images: (OpenedImage, OpenedImage)
        let pair: ImagePair
        do {
            let opener = ImageOpener(access)
            images = (
                try await opener.open(first, format: firstFormat),
                try await opener.open(second, format: secondFormat)
            )
            pair = try await ImagePair(images.0, images.1, isStrict: isStrict)
        } catch let error as ImageError {
            throw Failure(.opening, error)
        }
        var result = Result(
            difference: nil, firstSize: pair.firstSize, secondSize: pair.secondSize)
        if isStrict, pair.firstSize != pair.secondSize {
            result.difference = .size
        } else {
            result.difference = try await firstDifference(pair, images)
        }
        return result
    }

    private func firstDifference(
        _ pair: ImagePair, _ images: (OpenedImage, OpenedImage)
    ) async throws -> Difference? {
        let size = pair.size
        let pieceSize = max(
            Self.pieceSize, images.0.requestSize, images.1.requestSize, pair.readGranularity)
        let requests = images.0.requestsInFlight + images.1.requestsInFlight
        let bounds = Window.Bounds(
            base: max(Self.workers, requests), limit: nil, memory: Self.memory / 2,
            unit: pair.readGranularity, shortChunk: pieceSize)
        let layers = images.0.layers + images.1.layers
        let cursor = ComparisonCursor(end: size) { [onProgress] done in onProgress?(done, size) }
        let worker = ComparisonWorker(
            pair: pair, cursor: cursor,
            window: WindowGate(bounds, meters: layers.map(\.storage.readMeter)))
        try await IOExecutor.run {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for _ in 0..<min(Int64(bounds.most), size / pieceSize + 1) {
                    group.addTask { try await worker.run() }
                }
                for try await _ in group {}
            }
        }
        return try cursor.finding?.get()
    }
}
