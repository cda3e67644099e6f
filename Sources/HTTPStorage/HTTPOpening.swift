import CCurl
import Concurrency
import DiskImage
import Glibc
import ImageStorage

/// The first request for a file: it tells the size, the version, the address behind redirects, and
/// whether the server sends ranges.
///
/// The answer's bytes are kept, because headers and tables mostly lie there. HEAD is not used:
/// signed addresses often allow GET alone.
final class HTTPOpening: HTTPSink {
    /// Number of bytes asked for.
    static let headSize: Int64 = 256 << 10

    /// The way to read the rest of the file.
    enum Rest {
        case ranges(HTTPFile)
        case stream(HTTPBody)
        /// There is no rest.
        case none
    }

    private(set) var version = HTTPVersion(size: 0)
    private(set) var head: [UInt8] = []
    private let name: String
    private let loop: HTTPLoop
    private var verdict: HTTPVerdict?
    private var outcome: HTTPRequest.Outcome?
    private var isOver = false
    private var body: HTTPBody?

    private init(_ name: String, _ loop: HTTPLoop) {
        self.name = name
        self.loop = loop
    }

    /// Opens a file, in several attempts if the server is busy.
    ///
    /// - Throws: `ImageError`, or `CancellationError`.
    static func open(
        _ address: HTTPAddress, _ options: HTTPOptions, meter: CallMeter
    ) throws(ImageError) -> (HTTPVersion, head: [UInt8], Rest) {
        let loop = try HTTPLoop(most: options.connections ?? HTTPStorage.connections)
        let settings = HTTPSettings(options, address)
        var patience = HTTPPatience(retries: options.retries)
        while true {
            let opening = HTTPOpening(address.label, loop)
            let request = try HTTPRequest(
                settings, address: address.url, HTTPCommand(range: 0..<headSize), into: opening)
            request.onEnd = { [unowned opening] in
                opening.outcome = $0
                opening.isOver = true
            }
            loop.submit(request)
            loop.run { opening.isOver || Task.isCancelled }
            guard !Task.isCancelled else { throw opening.failure("interrupted") }
            if let rest = try opening.rest(address, options, request, meter) {
                try loop.start()
                return (opening.version, opening.head, rest)
            }
            guard let wait = patience.nextWait(asked: opening.secondsAsked) else {
                throw opening.failure(opening.outcome?.reason(opening.verdict) ?? "")
            }
            usleep(UInt32(wait) * 1000)
        }
    }

    /// - Returns: nil if another attempt may help.
    private func rest(
        _ address: HTTPAddress, _ options: HTTPOptions, _ request: HTTPRequest, _ meter: CallMeter
    ) throws(ImageError) -> Rest? {
        if let body {
            body.go(on: request)
            return .stream(body)
        }
        guard let outcome else { return nil }
        switch verdict {
        case .empty: return Rest.none
        case .range(let range) where Int64(head.count) == Int64(range.count):
            guard version.size >= 0 else {
                throw failure("the server does not tell the size of the file")
            }
            guard version.size > Int64(head.count) else { return Rest.none }
            return .ranges(
                try HTTPFile(
                    address, options, version: version, url: outcome.address, loop: loop,
                    meter: meter))
        case .wholeFile(nil):
            throw failure("the server sends neither ranges nor the size of the file")
        case .wholeFile(let size) where Int64(head.count) == size: return Rest.none
        case .range, .wholeFile, .busy: return nil
        case .forbidden, .error, .changed: throw failure(outcome.reason(verdict))
        case nil:
            if ccurl_kind(outcome.code) == ccurl_kind_passing { return nil }
            throw failure(outcome.reason(nil))
        }
    }

    private var secondsAsked: Int? {
        if case .busy(let seconds) = verdict { seconds } else { nil }
    }

    private func failure(_ reason: String) -> ImageError {
        ImageError(.system(errno: EIO), path: name, "cannot open: \(reason)")
    }

    func accept(_ answer: HTTPAnswer) -> Bool {
        let verdict = HTTPVerdict(answer, wanted: 0..<Self.headSize, version: nil)
        self.verdict = verdict
        version = HTTPVersion(
            size: answer.total ?? -1, etag: answer.etag, lastModified: answer.lastModified)
        switch verdict {
        case .range: return true
        case .wholeFile(let size):
            version.size = size ?? -1
            return size != nil
        default: return answer.length ?? .max <= Self.headSize
        }
    }

    func take(_ bytes: UnsafeRawBufferPointer) -> Bool {
        if let body { return body.take(bytes) }
        switch verdict {
        case .range: head += bytes
        case .wholeFile:
            guard head.count + bytes.count > Self.headSize else {
                head += bytes
                return true
            }
            // The first part that does not fit stays with the connection until it is wanted.
            let body = HTTPBody(name: name, head: head, loop: loop)
            self.body = body
            isOver = true
            return body.take(bytes)
        default: break
        }
        return true
    }
}
