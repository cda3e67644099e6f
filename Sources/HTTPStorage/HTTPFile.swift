import CCurl
import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// A file on a server, of which ranges can be read.
final class HTTPFile: Sendable {
    /// The address that requests go to: the one that redirects led to.
    private struct Place {
        var url: String
        var settings: HTTPSettings
        /// Number of times that the address was asked for anew.
        var renewals = 0
    }

    let version: HTTPVersion
    let name: String
    private let address: HTTPAddress
    private let options: HTTPOptions
    private let loops: [HTTPLoop]
    private let place: Mutex<Place>
    private let turn = Atomic<Int>(0)
    private let renewal = SerialGate()
    private let meter: CallMeter
    /// The shortest of recent waits, in nanoseconds.
    private let leastWait = Mutex(Double.infinity)

    /// Factor by which that grows with each request, because the server may have moved away.
    private static let waitGrowth = 1.05
    /// Time in nanoseconds: 5 ms.
    private static let farWait = 5e6

    /// - Parameters:
    ///   - loop: runs already; the first request went through it.
    ///   - url: the address that redirects led to.
    init(
        _ address: HTTPAddress, _ options: HTTPOptions, version: HTTPVersion, url: String,
        loop: HTTPLoop, meter: CallMeter
    ) throws(ImageError) {
        self.address = address
        self.options = options
        self.version = version
        self.meter = meter
        name = address.label
        place = Mutex(
            Place(url: url, settings: Self.settings(options, address, version: version, url: url)))
        // Two threads decrypt more than one; what comes unencrypted is only copied.
        let isEncrypted = url.lowercased().hasPrefix("https:")
        let connections = options.connections ?? HTTPStorage.connections
        var loops = [loop]
        if isEncrypted, IOExecutor.coreCount > 1, connections > 1 {
            let second = try HTTPLoop(most: connections / 2)
            try second.start()
            loops.append(second)
        }
        self.loops = loops
    }

    deinit { for loop in loops { loop.close() } }

    private static func settings(
        _ options: HTTPOptions, _ address: HTTPAddress, version: HTTPVersion, url: String
    ) -> HTTPSettings {
        HTTPSettings(
            options, address, version: version,
            isOrigin: HTTPAddress.origin(url) == HTTPAddress.origin(address.url))
    }

    /// Reads a range, in several attempts if need be.
    ///
    /// - Parameter isAhead: whether no reader waits for the range yet, so that its time tells
    ///   nothing.
    /// - Throws: `ImageError`, or `CancellationError`.
    func read(
        _ range: Range<Int64>, into memory: UnsafeMutableRawBufferPointer, isAhead: Bool = false
    ) async throws {
        var patience = HTTPPatience(retries: options.retries)
        var start = range.lowerBound
        while start < range.upperBound {
            let wanted = start..<range.upperBound
            let place = place.withLock { $0 }
            let sink = RangeSink(
                wanted, version,
                UnsafeMutableRawBufferPointer(
                    rebasing: memory[Int(start - range.lowerBound)...]))
            let outcome = try await get(wanted, from: place, into: sink)
            if sink.count > 0 { note(outcome.times, isAhead: isAhead) }
            start += Int64(sink.count)
            if sink.count > 0 { patience.noteProgress() }
            guard start < range.upperBound else { break }
            var asked: Int?
            switch sink.verdict {
            case .range where outcome.code == 0: continue
            case .forbidden where place.url != address.url:
                try await renew(after: place)
                guard patience.nextWait() != nil else { throw failure(wanted, outcome, .forbidden) }
                continue
            case .busy(let seconds): asked = seconds
            case .range: break
            case nil:
                if ccurl_kind(outcome.code) == ccurl_kind_lasting { throw failure(wanted, outcome) }
            case .changed: throw changed()
            case .wholeFile:
                throw error(wanted, "the server does not send ranges any more")
            case .empty, .forbidden, .error: throw failure(wanted, outcome, sink.verdict)
            }
            guard let wait = patience.nextWait(asked: asked) else {
                throw failure(wanted, outcome, sink.verdict)
            }
            try await Task.sleep(for: .milliseconds(wait))
        }
    }

    /// Notes how long a request waited before the server sent what was wanted. Where many are on
    /// their way, most wait for each other, too, so the shortest of recent waits counts.
    private func note(_ times: HTTPTimes, isAhead: Bool) {
        let wait = leastWait.withLock { least in
            least = min(times.wait, least * Self.waitGrowth)
            return least
        }
        guard !isAhead else { return }
        meter.note(.call(wall: wait + times.work, work: times.work))
    }

    /// Whether the server is so far away that much has to be on its way.
    var isFar: Bool { leastWait.withLock { $0.isFinite && $0 > Self.farWait } }

    private func get(
        _ range: Range<Int64>, from place: Place, into sink: RangeSink
    ) async throws -> HTTPRequest.Outcome {
        let request = try HTTPRequest(
            place.settings, address: place.url, HTTPCommand(range: range), into: sink)
        let loop = loops[turn.wrappingAdd(1, ordering: .relaxed).oldValue % loops.count]
        return try await loop.perform(request)
    }

    /// Asks for the address anew that the redirect leads to, because the old one may have expired.
    /// The first reader that finds it refused asks for all.
    ///
    /// - Throws: `ImageError` if that does not help.
    private func renew(after old: Place) async throws {
        await renewal.enter()
        defer { renewal.leave() }
        guard place.withLock({ $0.renewals }) == old.renewals else { return }
        try await findPlace(old.renewals + 1)
    }

    private func findPlace(_ renewals: Int) async throws {
        let wanted: Range<Int64> = 0..<1
        let byte = UnsafeMutableRawBufferPointer.allocate(byteCount: 1, alignment: 1)
        defer { byte.deallocate() }
        let sink = RangeSink(wanted, version, byte)
        let origin = Place(
            url: address.url, settings: HTTPSettings(options, address, version: version))
        let outcome = try await get(wanted, from: origin, into: sink)
        guard sink.count == 1 else {
            if sink.verdict == .changed { throw changed() }
            throw failure(wanted, outcome, sink.verdict)
        }
        let found = Place(
            url: outcome.address,
            settings: Self.settings(options, address, version: version, url: outcome.address),
            renewals: renewals)
        place.withLock { $0 = found }
    }

    private func changed() -> ImageError {
        ImageError(.invalid, path: name, "the file has changed on the server while it was read")
    }

    private func failure(
        _ range: Range<Int64>, _ outcome: HTTPRequest.Outcome, _ verdict: HTTPVerdict? = nil
    ) -> ImageError {
        // A server that is well otherwise refuses what it cannot read with a status such as 500.
        let isAboutRange = if case .busy = verdict { true } else { false }
        return error(range, outcome.reason(verdict), errno: isAboutRange ? EIO : ECONNABORTED)
    }

    private func error(
        _ range: Range<Int64>, _ reason: String, errno: Int32 = ECONNABORTED
    ) -> ImageError {
        ImageError(
            .system(errno: errno), path: name,
            "cannot read \(range.count) bytes at offset \(range.lowerBound): \(reason)")
    }
}

extension HTTPRequest.Outcome {
    /// The reason of a failure, for messages.
    func reason(_ verdict: HTTPVerdict?) -> String {
        switch verdict {
        case .error(let reason): reason
        case .busy, .forbidden, .empty, .changed: "the server answers \(answer.statusText)"
        case .range, .wholeFile, nil: failure.withoutControlCharacters
        }
    }
}

/// Takes the bytes of a range.
private final class RangeSink: HTTPSink {
    /// Longest body in bytes that is read to its end although it is no use, because the connection
    /// can be used again then.
    private static let shortBody: Int64 = 64 << 10

    private let wanted: Range<Int64>
    private let version: HTTPVersion
    private let memory: UnsafeMutableRawBufferPointer
    /// The meaning of the head; nil before it came.
    private(set) var verdict: HTTPVerdict?
    /// Number of bytes taken.
    private(set) var count = 0
    private var limit = 0

    init(
        _ wanted: Range<Int64>, _ version: HTTPVersion, _ memory: UnsafeMutableRawBufferPointer
    ) {
        self.wanted = wanted
        self.version = version
        self.memory = memory
    }

    func accept(_ answer: HTTPAnswer) -> Bool {
        let verdict = HTTPVerdict(answer, wanted: wanted, version: version)
        self.verdict = verdict
        guard case .range(let range) = verdict else {
            return answer.length ?? .max <= Self.shortBody
        }
        limit = range.count
        return true
    }

    func take(_ bytes: UnsafeRawBufferPointer) -> Bool {
        guard case .range = verdict else { return true }
        let taken = min(bytes.count, limit - count)
        UnsafeMutableRawBufferPointer(rebasing: memory[count..<count + taken])
            .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[..<taken]))
        count += taken
        return true
    }
}
