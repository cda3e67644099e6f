import CCurl
import Concurrency
import DiskImage
import ImageStorage

/// The receiver of a body.
package protocol HTTPSink: AnyObject {
    /// Called once, when the head is complete and the body begins.
    ///
    /// - Returns: whether the body is wanted.
    func accept(_ answer: HTTPAnswer) -> Bool

    /// - Returns: whether the bytes were taken; false pauses the request, and the same bytes come
    ///   again later.
    func take(_ bytes: UnsafeRawBufferPointer) -> Bool
}

/// The contents of a request.
package struct HTTPCommand {
    package var method = "GET"
    /// In bytes, not empty; nil asks for the whole file.
    package var range: Range<Int64>?
    /// Header lines besides those of the settings.
    package var headers: [String] = []
    /// The body. The caller keeps it alive until the request has ended.
    package var body: UnsafeRawBufferPointer?

    package init(
        _ method: String = "GET", range: Range<Int64>? = nil, headers: [String] = [],
        body: UnsafeRawBufferPointer? = nil
    ) {
        self.method = method
        self.range = range
        self.headers = headers
        self.body = body
    }
}

/// The times of a request, in nanoseconds.
package struct HTTPTimes: Sendable {
    package var elapsed: Double
    /// The time before the answer began, or the time in which the loop had nothing to do at all,
    /// whichever is longer.
    package var wait: Double
    /// The request's share of what the loop has worked meanwhile.
    package var work: Double
}

/// A request on its way. It belongs to its caller until it is submitted, and then to the thread
/// that runs its loop.
package final class HTTPRequest: @unchecked Sendable {
    /// The end of a request.
    package struct Outcome: Sendable {
        package var answer: HTTPAnswer
        /// libcurl's number of an error, or 0.
        package var code: Int32
        /// libcurl's words for it.
        package var failure: String
        /// The address that redirects led to.
        package var address: String
        package var times: HTTPTimes
        /// Whether the server is on this machine: both ends of the connection have one address.
        package var isLocal: Bool

        /// Whether the connection was lost or not made, so that another attempt may succeed.
        package var isPassing: Bool {
            let kind = ccurl_kind(code)
            return code != 0 && (kind == ccurl_kind_passing || kind == ccurl_kind_no_connection)
        }
    }

    /// libcurl's handle.
    private(set) var handle: UnsafeMutableRawPointer?
    /// The header lines of its own; nil if the settings have all.
    private var headers: UnsafeMutableRawPointer?
    private let failure: UnsafeMutablePointer<CChar>
    private let body: UnsafeMutablePointer<ccurl_body>
    private let sink: any HTTPSink
    private var answer = HTTPAnswer()
    private var isAccepted: Bool?
    /// Called once by the loop's thread when the request has ended; nil stands for a cancelled one.
    package var onEnd: ((Outcome?) -> Void)?

    package init(
        _ settings: HTTPSettings, address: String, _ command: HTTPCommand, into sink: any HTTPSink
    ) throws(ImageError) {
        self.sink = sink
        failure = .allocate(capacity: ccurl_failure_size)
        failure.initialize(repeating: 0, count: ccurl_failure_size)
        body = .allocate(capacity: 1)
        body.initialize(
            to: ccurl_body(
                bytes: command.body?.baseAddress?.assumingMemoryBound(to: CChar.self),
                size: command.body?.count ?? 0))
        if !command.headers.isEmpty {
            for line in settings.lines + command.headers {
                headers = ccurl_add_header(headers, line)
            }
        }
        let range = command.range.map { "\($0.lowerBound)-\($0.upperBound - 1)" }
        let context = Unmanaged.passUnretained(self).toOpaque()
        handle = command.method.withCString { method in
            address.withCString { url in
                withOptionalCString(range) { range in
                    var words = ccurl_command(
                        method: method, url: url, range: range, headers: headers, body: body)
                    return withUnsafePointer(to: settings.values) {
                        ccurl_request($0, &words, failure, context)
                    }
                }
            }
        }
        guard handle != nil else { throw .outOfMemory() }
    }

    deinit {
        if let handle { ccurl_free(handle) }
        ccurl_free_headers(headers)
        failure.deallocate()
        body.deallocate()
    }

    /// The address that redirects have led to.
    var address: String { String(cString: ccurl_address(handle)) }

    func noteHeader(_ line: String) { answer.note(line) }

    /// - Returns: the number of bytes taken, or `ccurl_pause`.
    func take(_ bytes: UnsafeRawBufferPointer) -> Int {
        if isAccepted == nil { isAccepted = sink.accept(answer) }
        guard isAccepted == true else { return 0 }
        return sink.take(bytes) ? bytes.count : ccurl_pause
    }

    /// The time in seconds from the end of the request to the first byte of the answer.
    var secondsBeforeAnswer: Double { ccurl_seconds_before_answer(handle) }

    func end(code: Int32, _ times: HTTPTimes) {
        // The body may have had no byte.
        if code == 0, isAccepted == nil { isAccepted = sink.accept(answer) }
        let words =
            code == ccurl_lost ? "the connection was lost" : String(cString: failure)
        onEnd?(
            Outcome(
                answer: answer, code: code,
                failure: words.isEmpty ? String(cString: ccurl_error(code)) : words,
                address: address, times: times,
                isLocal: ccurl_is_local(handle)))
        onEnd = nil
    }

    func cancel() {
        onEnd?(nil)
        onEnd = nil
    }

    /// The reason why libcurl could not be loaded, once per process; nil if it was loaded.
    static let loadFailure: String? = {
        let failure = ccurl_load(
            { context, line, count in
                guard let request = HTTPRequest.of(context), let line else { return }
                let bytes = UnsafeRawBufferPointer(start: line, count: count)
                request.noteHeader(String(decoding: bytes, as: UTF8.self).trimmed)
            },
            { context, bytes, count in
                guard let request = HTTPRequest.of(context) else { return 0 }
                return request.take(UnsafeRawBufferPointer(start: bytes, count: count))
            })
        return failure.map { String(cString: $0) }
    }()

    static func of(_ context: UnsafeMutableRawPointer?) -> HTTPRequest? {
        context.map { Unmanaged<HTTPRequest>.fromOpaque($0).takeUnretainedValue() }
    }
}

private func withOptionalCString<Result>(
    _ text: String?, _ body: (UnsafePointer<CChar>?) -> Result
) -> Result {
    guard let text else { return body(nil) }
    return text.withCString { body($0) }
}
