import Concurrency
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg compare`: finds the first difference between two guest disks.
///
/// Several workers compare cells of the disk in parallel, each cell front to back. No worker starts
/// a cell after a known difference, so the difference with the lowest offset is reported however
/// the workers run.
public struct Comparison: Sendable {
    /// A path, or a name that a driver of `Storages` claims; `second` likewise.
    public var first: ImageName
    public var second: ImageName
    /// nil detects the format from the first bytes; `secondFormat` likewise.
    public var firstFormat: ImageFormat?
    public var secondFormat: ImageFormat?
    /// Also compares sizes and block status (`-s`).
    public var isStrict = false
    public var access = StorageAccess()
    /// Called from any task with the number of compared bytes and the size of the larger guest
    /// disk.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    private static let workers = 8
    /// The smallest piece that a worker compares at once, in bytes, chosen so that the pieces of
    /// both images stay in the core's cache.
    private static let pieceSize: Int64 = 128 << 10
    /// The limit for all buffers together, in bytes.
    private static let memory: Int64 = 64 << 20

    public init(_ first: ImageName, _ second: ImageName) {
        self.first = first
        self.second = second
    }

    public enum Difference: Sendable, Equatable {
        /// The sizes of the guest disks differ; strict mode only.
        case size
        /// The block status differs at this guest offset in bytes; strict mode only.
        case blockStatus(at: Int64)
        /// The content differs at this guest offset in bytes, the start of a 512-byte unit counted
        /// from the start of the compared range.
        case content(at: Int64)
    }

    public struct Result: Sendable, Equatable {
        /// nil if the images are equal.
        public var difference: Difference?
        /// Size of the first guest disk in bytes, rounded up to whole sectors; `secondSize`
        /// likewise. The part that only one disk has is compared with zeros.
        public var firstSize: Int64
        public var secondSize: Int64
    }

    /// A failed comparison, with the step that failed, for which callers have separate exit
    /// statuses.
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
        let storages = images.0.storages + images.1.storages
        let cursor = ComparisonCursor(end: size)
        let worker = ComparisonWorker(
            pair: pair, cursor: cursor,
            window: WindowGate(bounds, meters: storages.map(\.readMeter)),
            progress: ProgressMark { [onProgress] done in onProgress?(done, size) })
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
