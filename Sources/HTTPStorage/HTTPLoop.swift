import CCurl
import Concurrency
import DiskImage
import Glibc
import Synchronization

/// Connections to a server, and the thread that moves bytes through them.
package final class HTTPLoop: @unchecked Sendable {
    /// Messages of other threads for the thread of the loop.
    private struct Inbox {
        var newcomers: [HTTPRequest] = []
        var cancelled: [HTTPRequest] = []
        var resumed: [HTTPRequest] = []
        var isClosed = false
    }

    private struct Moment {
        var time = ContinuousClock.now
        /// Time in nanoseconds that the loop had worked.
        var work: Double
    }

    private let connections: UnsafeMutableRawPointer
    private let inbox = Mutex(Inbox())
    // Used by the thread that runs the loop:
    /// The requests on their way, and when each began.
    private var requests: [ObjectIdentifier: (HTTPRequest, begin: Moment)] = [:]
    /// Time in nanoseconds that the loop has worked, and since when it works.
    private var work = 0.0
    private var wake = ContinuousClock.now

    /// Longest sleep in milliseconds. Something else always ends it earlier.
    private static let longestSleep: Int32 = 60_000
    /// Time in milliseconds after which a thread that waits asks whether it still should.
    private static let glance: Int32 = 100

    /// - Parameter most: largest number of connections.
    ///
    /// - Throws: `ImageError`, also if libcurl is not there.
    package init(most: Int) throws(ImageError) {
        if let failure = HTTPRequest.loadFailure {
            throw ImageError(.unsupported, "HTTP needs the library libcurl: \(failure)")
        }
        guard let made = ccurl_multi(most) else { throw .outOfMemory() }
        connections = made
    }

    deinit { ccurl_multi_free(connections) }

    /// Runs the loop in the calling thread until a condition holds. Not after `start`.
    ///
    /// - Parameter isOver: asked whenever something has happened, and now and then.
    package func run(until isOver: () -> Bool) {
        var mask = Self.blockBrokenPipes()
        defer {
            // One that is pending would arrive now.
            var signals = Self.brokenPipe
            var now = timespec()
            _ = sigtimedwait(&signals, nil, &now)
            pthread_sigmask(SIG_SETMASK, &mask, nil)
        }
        while !isOver() {
            turn()
            if isOver() { break }
            sleep(Self.glance)
        }
    }

    /// Starts a thread that runs the loop until it is closed.
    package func start() throws(ImageError) {
        let status = startThread {
            _ = Self.blockBrokenPipes()
            while self.turn() { self.sleep(Self.longestSleep) }
        }
        guard status == 0 else {
            throw ImageError(
                .system(errno: status),
                "cannot start a thread for HTTP: " + String(cString: strerror(status)))
        }
    }

    private static var brokenPipe: sigset_t {
        var signals = sigset_t()
        sigemptyset(&signals)
        sigaddset(&signals, SIGPIPE)
        return signals
    }

    /// Blocks SIGPIPE in the calling thread. A TLS library that writes to a connection which the
    /// server has closed would end the process otherwise, without a word.
    ///
    /// - Returns: the signals that were blocked before.
    private static func blockBrokenPipes() -> sigset_t {
        var signals = brokenPipe
        var before = sigset_t()
        pthread_sigmask(SIG_BLOCK, &signals, &before)
        return before
    }

    /// Sends a request, and returns when it has ended.
    ///
    /// - Throws: `CancellationError`.
    package func perform(_ request: HTTPRequest) async throws -> HTTPRequest.Outcome {
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                request.onEnd = {
                    if let outcome = $0 {
                        continuation.resume(returning: outcome)
                    } else {
                        continuation.resume(throwing: CancellationError())
                    }
                }
                submit(request)
            }
        } onCancel: {
            cancel(request)
        }
    }

    package func submit(_ request: HTTPRequest) { leave { $0.newcomers.append(request) } }

    /// Ends a request. `onEnd` is called in any case, and from then on the sink is not used.
    package func cancel(_ request: HTTPRequest) { leave { $0.cancelled.append(request) } }

    /// Goes on with a request that its sink has paused.
    package func resume(_ request: HTTPRequest) { leave { $0.resumed.append(request) } }

    package func close() { leave { $0.isClosed = true } }

    private func leave(_ change: (inout Inbox) -> Void) {
        inbox.withLock { change(&$0) }
        ccurl_multi_wake(connections)
    }

    private func sleep(_ milliseconds: Int32) {
        work += wake.nanoseconds(to: .now)
        ccurl_multi_wait(connections, milliseconds)
        wake = .now
    }

    /// - Returns: whether the loop goes on.
    @discardableResult private func turn() -> Bool {
        let news = inbox.withLock { inbox in
            defer { inbox = Inbox(isClosed: inbox.isClosed) }
            return inbox
        }
        for request in news.newcomers {
            requests[ObjectIdentifier(request)] = (request, Moment(work: workSoFar))
            guard ccurl_multi_add(connections, request.handle) else {
                finish(request) { $0.end(code: ccurl_no_memory, $1) }
                continue
            }
        }
        for request in news.resumed where requests[ObjectIdentifier(request)] != nil {
            ccurl_go_on(request.handle)
        }
        for request in news.cancelled where requests[ObjectIdentifier(request)] != nil {
            finish(request) { request, _ in request.cancel() }
        }
        guard !news.isClosed else {
            for (request, _) in requests.values {
                finish(request) { request, _ in request.cancel() }
            }
            return false
        }
        ccurl_multi_perform(connections)
        var code: Int32 = 0
        var context: UnsafeMutableRawPointer?
        while ccurl_multi_next(connections, &code, &context) != nil {
            guard let request = HTTPRequest.of(context) else { continue }
            finish(request) { $0.end(code: code, $1) }
        }
        return true
    }

    private var workSoFar: Double { work + wake.nanoseconds(to: .now) }

    /// - Parameter end: gets the times of the request.
    private func finish(_ request: HTTPRequest, _ end: (HTTPRequest, HTTPTimes) -> Void) {
        ccurl_multi_remove(connections, request.handle)
        let inFlight = Double(requests.count)
        guard let begin = requests.removeValue(forKey: ObjectIdentifier(request))?.begin else {
            return
        }
        let elapsed = begin.time.nanoseconds(to: .now)
        let worked = workSoFar - begin.work
        let wait = max(request.secondsBeforeAnswer * 1e9, elapsed - worked)
        end(request, HTTPTimes(elapsed: elapsed, wait: wait, work: worked / inFlight))
    }
}
