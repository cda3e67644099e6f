import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import Synchronization

/// One `swimg digest`: computes the digest of a guest disk.
public struct GuestDigest: Sendable {
    /// A path, or a name that a driver of `Storages` claims.
    public var name: ImageName
    /// nil detects the format from the first bytes.
    public var format: ImageFormat?
    public var algorithm = DigestAlgorithm.blkhash
    public var access = StorageAccess()
    /// Called from any task with the number of bytes done and the size of the guest disk.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    public init(_ name: ImageName) { self.name = name }

    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled.
    public func run() async throws -> DiskDigest {
        var opener = ImageOpener(access)
        opener.streaming = SourceStreaming()
        let image = try await opener.open(name, format: format)
        let source: any ImageSource =
            image.topLayer.isOpenEnded
            ? OpenEndedSource(image.topLayer) : try ConcatenatedSource([image.source])
        var pipeline = Pipeline(writesInOrder: false)
        pipeline.readMeters = image.storages.map(\.readMeter)
        pipeline.checkSource = { try await image.topLayer.storage.finishReading() }
        if image.topLayer.storage.traits.isStream { pipeline.memory = StreamStorage.inFlight }
        if image.requestsInFlight > 0 {
            pipeline.baseWorkers = max(pipeline.baseWorkers, image.requestsInFlight)
            pipeline.chunkSize = image.requestSize
            pipeline.readsAhead = image.storages.contains { $0.traits.readsAhead }
        }
        if let onProgress {
            pipeline.onProgress = { done in
                guard image.topLayer.isOpenEnded else {
                    return onProgress(done, source.virtualSize)
                }
                let stream = image.topLayer.storage.streamProgress
                if let stream { onProgress(stream.done, stream.total) }
            }
        }
        let result = Mutex<DiskDigest?>(nil)
        pipeline.digests = [
            try DigestStage(algorithm) { digest in result.withLock { $0 = digest } }
        ]
        try await pipeline.copy(from: source, extents: source, to: DiscardingTarget())
        guard let digest = result.withLock({ $0 }) else { throw CancellationError() }
        return digest
    }
}

/// A target that discards everything, for disks that are only read.
private struct DiscardingTarget: ImageTarget {
    let traits = TargetTraits(granularity: 4096, readsAsZeroFrom: 0, placesInOrder: false)
    var compresses: Bool { false }

    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) -> [EncodedPiece] { [] }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) -> Placement { Placement() }

    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws {}

    func finish(virtualSize: Int64) async throws {}
}
