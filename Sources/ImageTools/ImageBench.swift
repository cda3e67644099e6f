import Concurrency
import DiskImage
import Glibc
import ImageDrivers
import ImageFormats
import ImageStorage
import Synchronization

/// One `swimg bench`: sends requests of one length to an image, many at once, at offsets that grow
/// by one step, and measures the time.
public struct ImageBench: Sendable {
    public var image: ImageInPlace
    /// Number of requests.
    public var count = 75000
    /// Number of requests in flight.
    public var depth = 64
    /// Guest offset of the first request in bytes.
    public var offset: Int64 = 0
    /// Length of each request in bytes.
    public var length = 4096
    /// Distance in bytes from one request to the next; nil is their length.
    public var step: Int64?
    /// The byte that is written everywhere; nil reads.
    public var pattern: UInt8?
    /// Number of requests after which there is a flush; nil never flushes.
    public var flushInterval: Int?
    /// Whether a flush waits for the requests before it, and those behind it wait for the flush.
    public var drainsOnFlush = true
    /// Called when the image is open.
    public var onOpened: @Sendable () -> Void = {}

    public init(_ image: ImageInPlace) { self.image = image }

    /// - Returns: the time from the first request to the answer to the last one.
    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled. An image that was
    ///   being written to is valid then.
    public func run() async throws -> Duration {
        guard let pattern else {
            let opened = try await ImageOpener(image.access).open(image.name, format: image.format)
            return try await measure(DiskReader(opened.source, length: length))
        }
        let place = try image.place()
        if let described = try ImageDescription(image.name), !described.isWhole {
            throw ImageError.unsupported(
                image.name.description, "an image that is a part of a file can only be read")
        }
        let target = try Storages.driver(for: place).beginTarget(
            place, TargetRequest(.writeInto, access: image.access))
        do {
            let writer = try await writer(on: target.storage, at: place, pattern)
            let time = try await measure(writer)
            try await writer.finish()
            try await target.commit()
            return time
        } catch {
            target.abandon()
            throw error
        }
    }

    private func writer(
        on storage: any WritableStorage, at place: ImageName, _ pattern: UInt8
    ) async throws -> any BenchedTarget {
        let described = try ImageDescription(image.name)
        let format = try await ImageOpener().knownFormat(
            image.format, of: storage, described: described)
        guard !format.driver.isPlain else {
            if image.format == nil, described?.format == nil { image.onGuessedRaw?() }
            return try StorageWriter(storage, length: length, pattern)
        }
        guard let creator = format.driver.creator else {
            throw ImageError.unsupported(
                storage.name, "images of the format '\(format)' can only be read")
        }
        guard described?.encryption.secret == nil else {
            throw ImageError.unsupported(
                storage.name, "writing to an encrypted image is not supported yet")
        }
        let own = try await format.driver.open(storage)
        let data = try image.openData(of: own)
        let top = data.map { own.reading(dataFrom: $0) } ?? own
        var layers = [top]
        if let backing = top.backing, described?.ignoresBacking != true {
            layers += try await ImageOpener(image.access).openBackingChain(
                backing, of: place, in: storage
            ).map(\.image)
        }
        var settings = TargetSettings(minSparse: 0)
        settings.isThere = true
        var written = try creator.existingImage(top, leavesBacking: true)
        if let data { written.setData(data) }
        let target = try await written.makeTarget(on: storage, size: top.virtualSize, settings)
        return try ClusterWriter(
            target, on: storage, before: LayeredSource(layers: layers), length: length, pattern)
    }

    // MARK: The requests

    private func measure(_ disk: any BenchedDisk) async throws -> Duration {
        onOpened()
        let requests = BenchRequests(self, size: disk.size)
        let start = ContinuousClock.now
        try await IOExecutor.run {
            guard let flushInterval, drainsOnFlush else {
                return try await send(requests, downTo: 0, to: disk)
            }
            // A flush comes where the number of requests behind it is a multiple of the interval.
            var left = count
            while left > 0 {
                left = (left - 1).roundedDown(to: flushInterval)
                try await send(requests, downTo: left, to: disk)
                try await disk.flush()
            }
        }
        return ContinuousClock.now - start
    }

    /// Sends requests until so many are left, and returns when all are answered.
    private func send(
        _ requests: BenchRequests, downTo left: Int, to disk: any BenchedDisk
    ) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            for _ in 0..<min(depth, requests.left - left) {
                group.addTask {
                    while let request = requests.next(downTo: left) {
                        try Task.checkCancellation()
                        try await self.send(at: request.offset, to: disk)
                        if let flushInterval, !drainsOnFlush, request.behind % flushInterval == 0 {
                            try await disk.flush()
                        }
                    }
                }
            }
            for try await _ in group {}
        }
    }

    private func send(at offset: Int64, to disk: any BenchedDisk) async throws {
        do {
            guard offset <= disk.size - Int64(length) else {
                throw ImageError(
                    .system(errno: EIO), path: image.name.description,
                    "\(length) bytes at offset \(offset) are not within the disk, which has "
                        + "\(disk.size)")
            }
            try await disk.send(at: offset)
        } catch let error as ImageError {
            guard case .system(let number) = error.kind else { throw error }
            throw error.asQemu(
                "Failed request: \(String(cString: strerror(number)))", standsAlone: true)
        }
    }
}

/// The requests that have not been sent.
private final class BenchRequests: Sendable {
    private let step: Int64
    private let end: Int64
    private let size: Int64
    private let state: Mutex<(left: Int, offset: Int64)>

    /// - Parameter size: of the disk in bytes.
    init(_ bench: ImageBench, size: Int64) {
        self.size = size
        step = bench.step ?? Int64(bench.length)
        end = size - Int64(bench.length)
        state = Mutex((bench.count, bench.offset))
    }

    var left: Int { state.withLock { $0.left } }

    /// - Parameter limit: number of requests that stay.
    /// - Returns: guest offset of a request in bytes, and the number of requests behind it; nil if
    ///   there are no more.
    func next(downTo limit: Int) -> (offset: Int64, behind: Int)? {
        state.withLock { state in
            guard state.left > limit else { return nil }
            state.left -= 1
            let offset = state.offset
            state.offset = (offset + step) % max(1, size)
            // The rest of the disk is too short for a request.
            if state.offset > end { state.offset = 0 }
            return (offset, state.left)
        }
    }
}
