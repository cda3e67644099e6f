import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// An export of an NBD server, over one connection or several.
public final class NBDStorage: WritableStorage {
    /// Shortest question about the block status, in bytes: long enough for few questions, and a
    /// server that answers in detail answers for less.
    private static let statusReach: Int64 = 1 << 30
    /// Longest question about the block status, in bytes: lengths have 32 bits.
    private static let longestStatus: Int64 = 2 << 30
    /// Longest read or write in bytes that callers are advised to make: each needs a buffer.
    private static let longestCall: Int64 = 1 << 20

    public let name: String
    public let size: Int64
    public let traits: StorageTraits
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()
    let connections: NBDConnectionPool
    var facts: NBDHandle.Facts { connections.facts }
    /// Length of a request in bytes, a multiple of the smallest block.
    let pieceSize: Int64
    /// Whether a long request has been sent, see `isPrimed`.
    private let hasSentLong: Atomic<Bool>
    /// Whether a change counts as done only when it is on stable storage.
    private let writesThrough: Bool
    /// Whether lost connections are made anew.
    let mayReconnect: Bool
    private let status = Mutex(NBDKnownStatus())
    /// Number of refusals in a row to zero fast: the server would have had to write zeros.
    let fastZeroRefusals = Atomic<Int>(0)
    /// Number of trims in a row after which the server had kept everything.
    let keptTrims = Atomic<Int>(0)
    /// Whether zeroing ended in the error for an operation that is not supported.
    let refusesZero = Atomic<Bool>(false)
    /// Whether trimming ended in an error.
    let refusesTrim = Atomic<Bool>(false)
    /// Held while blocks are read, changed in part and written back.
    private let blockGate = SerialGate()
    /// The server that was started for this export; it runs as long as this object exists.
    private let server: NBDServer?

    /// Opens the export that a name means, or starts the server and opens its export.
    ///
    /// - Throws: `ImageError` if the name means neither, if that fails, or if the export is to be
    ///   written and is read-only.
    static func open(
        _ name: ImageName, _ options: NBDOptions, forWriting: Bool = false
    ) throws(ImageError) -> NBDStorage {
        guard let command = NBDServerCommand(name: name) else {
            guard let address = try NBDAddress(name) else {
                throw .invalid("'\(name)' is not the name of an NBD export")
            }
            return try NBDStorage(address, options, forWriting: forWriting)
        }
        let server = try NBDServer(command)
        do {
            return try NBDStorage(server.address, options, forWriting: forWriting, server: server)
        } catch {
            // A server that could not start ends within a moment. Its own message is on stderr
            // already; this error says which server it was.
            guard error.kind != .system(errno: EFBIG), let end = server.ended(within: 1000) else {
                throw error
            }
            throw ImageError(.invalid, path: server.address.name, "the server \(end)")
        }
    }

    /// Whether `open` accepts a name.
    static func isName(_ name: ImageName) -> Bool {
        NBDAddress.isNBD(name) || NBDServerCommand(name: name) != nil
    }

    private init(
        _ address: NBDAddress, _ options: NBDOptions, forWriting: Bool, server: NBDServer? = nil
    ) throws(ImageError) {
        connections = try NBDConnectionPool(address, options, forWriting: forWriting)
        let facts = connections.facts
        name = address.name
        size = facts.size
        guard size <= largestDiskSize else { throw .tooLarge("cannot open", path: name) }
        let block = facts.minimumBlock
        let isLocal = connections.isServerLocal
        // A multiple of what the server prefers, as near to our own length as possible.
        let preferred = max(block, facts.preferredBlock)
        let wanted = min(
            max(options.requestSize(isServerLocal: isLocal).roundedDown(to: preferred), preferred),
            facts.maximumPayload)
        pieceSize = max(block, wanted.roundedDown(to: wanted < preferred ? block : preferred))
        // A length that the user chose is never exceeded.
        hasSentLong = Atomic(options.requestSize != nil)
        writesThrough = options.writesThrough || forWriting && options.reconnectTime != nil
        mayReconnect = options.reconnectTime != nil
        if forWriting, mayReconnect, !facts.canWriteThrough, !facts.canFlush {
            throw ImageError(
                .unsupported, path: address.name,
                "cannot be written with --reconnect: the server supports neither FUA nor flush")
        }
        // On this machine, more than one for each core would only take turns with the server.
        let beginning = isLocal ? min(connections.count, NBDLoop.count) : connections.count
        // Several at once: tasks wait fewer times, and the first can be a long one (`isPrimed`).
        let together = Int(max(1, min(Self.longestCall / pieceSize, 4)))
        traits = StorageTraits(
            isDevice: true, isRemote: true, readsAsZero: false,
            hasHoles: facts.canBlockStatus && address.context == nil,
            requestsInFlight: (beginning * options.requests(isServerLocal: isLocal) + together - 1)
                / together,
            requestSize: pieceSize * Int64(together), blockSize: block)
        self.server = server
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(buffer.byteCount)
        guard !range.isEmpty else { return }
        guard range.upperBound <= size else { throw ImageError.beyondEnd(self, range) }
        // The span is borrowed until this call returns, so the memory stays alive.
        let memory = buffer.withUnsafeMutableBytes { $0 }
        if isAligned(range) {
            try await read(into: memory, at: offset)
        } else {
            let blocks = try await wholeBlocks(range)
            withExtendedLifetime(blocks) {
                memory.copyMemory(from: UnsafeRawBufferPointer(blocks.wanted))
            }
        }
    }

    private func read(into memory: UnsafeMutableRawBufferPointer, at offset: Int64) async throws {
        try await send(
            pieces(memory.count).map {
                NBDRequest(
                    .read(UnsafeMutableRawBufferPointer(rebasing: memory[$0])),
                    at: offset + Int64($0.lowerBound))
            })
    }

    public func write(_ bytes: RawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(bytes.byteCount)
        guard !range.isEmpty else { return }
        guard range.upperBound <= size else { throw beyondExport(range) }
        let memory = bytes.withUnsafeBytes { $0 }
        if isAligned(range) { return try await write(memory, at: offset) }
        // The rest of the first and last block has to stay. Two neighbours that meet within a block
        // (clusters smaller than blocks) must not both put back what they read before.
        await blockGate.enter()
        defer { blockGate.leave() }
        let blocks = try await wholeBlocks(range)
        blocks.wanted.copyMemory(from: memory)
        try await write(UnsafeRawBufferPointer(blocks.memory), at: blocks.offset)
        withExtendedLifetime(blocks) {}
    }

    private func write(_ memory: UnsafeRawBufferPointer, at offset: Int64) async throws {
        try await change(
            pieces(memory.count).map {
                NBDRequest(
                    .write(UnsafeRawBufferPointer(rebasing: memory[$0])),
                    at: offset + Int64($0.lowerBound))
            })
    }

    /// Sends requests that change the export. If they have to be stable at once, each request says
    /// so itself (FUA), or a flush follows.
    ///
    /// A server that is killed forgets what it acknowledged and had not yet stored, and the server
    /// that is started in its place knows nothing about it. So a connection may be made anew during
    /// a write only if the write is stable when it is acknowledged (FUA); otherwise write and flush
    /// are repeated until they pass without a new connection. Every connection takes part in a
    /// flush, which notices earlier losses.
    func change(_ requests: [NBDRequest]) async throws {
        var renewals: Int
        repeat {
            renewals = connections.renewals
            try await sendChange(requests)
            try await makeStable()
        } while !facts.canWriteThrough && connections.renewals != renewals
    }

    func sendChange(_ requests: [NBDRequest]) async throws {
        let isSaid = writesThrough && facts.canWriteThrough
        for request in requests { request.writesThrough = isSaid }
        defer { status.withLock { $0.noteChange() } }
        try await send(requests)
    }

    /// Flushes changes that could not ask for FUA.
    func makeStable() async throws {
        if writesThrough, !facts.canWriteThrough { try await flush() }
    }

    private func isAligned(_ range: Range<Int64>) -> Bool {
        range.lowerBound % facts.minimumBlock == 0 && range.upperBound % facts.minimumBlock == 0
    }

    /// Reads the blocks that contain a range.
    private func wholeBlocks(_ range: Range<Int64>) async throws -> WholeBlocks {
        let start = range.lowerBound.roundedDown(to: facts.minimumBlock)
        let end = min(size, range.upperBound.roundedUp(to: facts.minimumBlock))
        let blocks = try WholeBlocks(start..<end, around: range)
        try await read(into: blocks.memory, at: start)
        return blocks
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        guard facts.canBlockStatus else { return Extent(range: offset..<limit, isHole: false) }
        let (known, changes) = status.withLock {
            ($0.known.extent(at: offset, limit: limit), $0.changes)
        }
        if let known { return known }
        let start = offset.roundedDown(to: facts.minimumBlock)
        let wanted = max(limit.roundedUp(to: facts.minimumBlock), start + Self.statusReach)
        let end = start + min(size - start, wanted - start, Self.longestStatus)
        let answer = try await blockStatus(start..<end)
        status.withLock { $0.note(answer, asOf: changes) }
        // If the server says nothing about a range, it has to be read.
        return answer.extent(at: offset, limit: limit)
            ?? Extent(range: offset..<limit, isHole: false)
    }

    /// Asks the server for block status. The answer can be shorter or longer than the range.
    ///
    /// - Parameter range: whole blocks, at most `longestStatus` bytes.
    func blockStatus(_ range: Range<Int64>) async throws -> ExtentList {
        let question = NBDRequest(.blockStatus(count: Int64(range.count)), at: range.lowerBound)
        try await send([question])
        return ExtentList(question.extents)
    }

    public func truncate(to size: Int64) async throws {
        guard size > self.size else { return }
        throw Syscall.failure(
            name, "the export is too small: \(self.size) bytes, needed are \(size)",
            errno: ENOSPC)
    }

    public func requireSpace(_ bytes: Int64) {}

    /// Flushes every connection, because without multi-conn none speaks for the others. The caller
    /// has awaited all writes.
    public func flush() async throws {
        guard facts.canFlush else { return try await makeSureOfServer() }
        let opened = connections.opened
        try await send(opened.map { _ in NBDRequest(.flush, at: 0) }, each: opened)
    }

    /// Reads from every connection if the server cannot flush: an answer shows that the server is
    /// still the one that acknowledged the writes before.
    private func makeSureOfServer() async throws {
        let range = 0..<min(size, max(facts.minimumBlock, guestSectorSize))
        guard !range.isEmpty else { return }
        let opened = connections.opened
        let answers = try opened.map { _ in try WholeBlocks(range, around: range) }
        try await send(answers.map { NBDRequest(.read($0.memory), at: 0) }, each: opened)
        withExtendedLifetime(answers) {}
    }

    func beyondExport(_ range: Range<Int64>) -> ImageError {
        Syscall.failure(
            name, "cannot write \(range.count) bytes at offset \(range.lowerBound)",
            errno: ENOSPC)
    }

    /// Cuts a read or a write into ranges for requests.
    private func pieces(_ count: Int) -> [Range<Int>] {
        let size = isPrimed(by: count) ? Int(pieceSize) : count
        return stride(from: 0, to: count, by: size).map { $0..<min($0 + size, count) }
    }

    /// Whether a call is to be cut; false for the first one that is long enough, which goes as one
    /// request. A server that takes memory for each request from glibc, as qemu-nbd does, has the
    /// kernel map it anew each time, unless a longer block has been freed before. After one long
    /// request the others find memory that is mapped, and copying between two such servers takes
    /// half the time.
    private func isPrimed(by count: Int) -> Bool {
        count <= pieceSize || count > facts.maximumPayload
            || hasSentLong.exchange(true, ordering: .relaxed)
    }

    /// Time in nanoseconds that a server on this machine takes for a request, and for each byte. It
    /// counts as work, although the server does it.
    private static let workPerRequest = 100_000.0
    private static let workPerByte = 0.5

    private func note(_ requests: [NBDRequest], since start: ContinuousClock.Instant) {
        guard let first = requests.first, first.movesData else { return }
        let work = requests.reduce(0) {
            $0 + Self.workPerRequest + Self.workPerByte * Double($1.payload)
        }
        (first.isRead ? readMeter : writeMeter).note(
            .call(wall: start.nanoseconds(to: .now), work: work))
    }

    /// Sends requests, and returns when all are answered.
    ///
    /// - Parameter each: the connections that get one request each; nil lets the pool choose.
    private func send(
        _ requests: [NBDRequest], each given: [NBDConnection]? = nil
    ) async throws {
        let start = ContinuousClock.now
        defer { note(requests, since: start) }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let transfer = NBDTransfer(count: requests.count, continuation)
                for request in requests { request.transfer = transfer }
                if let given {
                    for (connection, request) in zip(given, requests) { connection.submit(request) }
                } else {
                    for request in requests { connections.submit(request) }
                }
            }
        } onCancel: {
            // A silent server must not block us. The memory is safe when the connection is gone.
            connections.abort()
        }
    }
}

/// A copy of the blocks around a range that does not consist of whole blocks.
private final class WholeBlocks {
    let memory: UnsafeMutableRawBufferPointer
    /// Offset of the first block in bytes.
    let offset: Int64
    /// The range itself in `memory`.
    let wanted: UnsafeMutableRawBufferPointer

    init(_ blocks: Range<Int64>, around range: Range<Int64>) throws(ImageError) {
        var start: UnsafeMutableRawPointer?
        guard posix_memalign(&start, IOBuffer.alignment, blocks.count) == 0 else {
            throw .outOfMemory(blocks.count)
        }
        memory = UnsafeMutableRawBufferPointer(start: start, count: blocks.count)
        offset = blocks.lowerBound
        let first = Int(range.lowerBound - offset)
        wanted = UnsafeMutableRawBufferPointer(rebasing: memory[first..<first + range.count])
    }

    deinit { free(memory.baseAddress) }
}
