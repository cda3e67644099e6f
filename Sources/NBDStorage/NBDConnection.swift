import CLinux
import DiskImage
import Glibc
import Synchronization

/// One connection to a server, and the thread that drives it: many requests are in flight, and nobody
/// else waits in a system call for them.
///
/// A connection that breaks is made anew, and what was in flight on it is asked for once more. That is
/// safe for writes, too: each says what a range is to hold, and no two of them overlap.
final class NBDConnection: Sendable {
    /// How often a connection is made anew without a single answer in between.
    private static let attempts = 6
    /// The first pause before that, in milliseconds; each further one is twice as long.
    private static let firstPause = 100

    let facts: NBDHandle.Facts
    private let address: NBDAddress
    private let options: NBDOptions
    private let mailbox: Mailbox

    /// Connects, and starts the thread.
    init(_ address: NBDAddress, _ options: NBDOptions) throws(ImageError) {
        let handle = try NBDHandle(
            address, timeout: options.timeout, isGivenUp: { Task.isCancelled })
        self.address = address
        self.options = options
        facts = handle.facts
        mailbox = try Mailbox(name: address.name)
        let driver = Driver(handle, address, options, mailbox)
        guard startThread({ driver.run() }) else {
            throw ImageError(
                .system(errno: EAGAIN), path: address.name, "cannot start a thread")
        }
    }

    deinit { mailbox.close() }

    /// Hands a request over. It is answered through its transfer.
    func submit(_ request: NBDRequest) { mailbox.post(request) }

    /// Gives up everything that is in flight; the connection is of no use afterwards.
    func abort() { mailbox.abort() }

    /// What other threads leave for the connection's own.
    fileprivate final class Mailbox: Sendable {
        struct Content {
            var requests: [NBDRequest] = []
            /// No more will come.
            var isClosed = false
            var isAborted = false
        }

        let descriptor: Int32
        private let content = Mutex(Content())

        init(name: String) throws(ImageError) {
            descriptor = clinux_eventfd()
            guard descriptor >= 0 else {
                throw ImageError(
                    .system(errno: errno), path: name,
                    "cannot connect: " + String(cString: strerror(errno)))
            }
        }

        deinit { _ = Glibc.close(descriptor) }

        func post(_ request: NBDRequest) {
            let isRefused = content.withLock {
                if !$0.isAborted { $0.requests.append(request) }
                return $0.isAborted
            }
            if isRefused {
                request.transfer?.finish(CancellationError())
            } else {
                ring()
            }
        }

        func close() {
            content.withLock { $0.isClosed = true }
            ring()
        }

        func abort() {
            content.withLock { $0.isAborted = true }
            ring()
        }

        private func ring() {
            var one: UInt64 = 1
            _ = Glibc.write(descriptor, &one, MemoryLayout<UInt64>.size)
        }

        var isAborted: Bool { content.withLock { $0.isAborted } }

        func take() -> Content {
            var count: UInt64 = 0
            _ = Glibc.read(descriptor, &count, MemoryLayout<UInt64>.size)
            return content.withLock { content in
                defer { content.requests = [] }
                return content
            }
        }
    }

    /// The state of the connection's thread.
    private final class Driver: @unchecked Sendable {
        private let address: NBDAddress
        private let options: NBDOptions
        /// How many requests may be in flight.
        private let limit: Int
        private let mailbox: Mailbox
        private let inbox = NBDInbox()
        private var handle: NBDHandle?
        private let facts: NBDHandle.Facts
        private var waiting: [NBDRequest] = []
        private var flying: [NBDRequest] = []
        private var failedAttempts = 0
        private var lastAnswer = ContinuousClock.now
        /// Set when the connection has been given up.
        private var failure: (any Error)?

        init(
            _ handle: NBDHandle, _ address: NBDAddress, _ options: NBDOptions, _ mailbox: Mailbox
        ) {
            self.handle = handle
            facts = handle.facts
            self.address = address
            self.options = options
            limit = options.requests(to: address)
            self.mailbox = mailbox
        }

        func run() {
            while true {
                let mail = mailbox.take()
                waiting += mail.requests
                if mail.isAborted { failure = failure ?? CancellationError() }
                if mail.isClosed, handle == nil, flying.isEmpty, waiting.isEmpty { return }
                if failure == nil, handle == nil { reconnect() }
                if let failure {
                    giveUp(failure)
                    if mail.isClosed || mail.isAborted { return }
                    waitForMail()
                    continue
                }
                beginWaiting()
                deliver()
                if mail.isClosed, flying.isEmpty, waiting.isEmpty {
                    handle?.disconnect()
                    return
                }
                guard let handle, !handle.isOver else {
                    lose()
                    continue
                }
                if waiting.isEmpty || flying.count >= limit {
                    handle.wait(milliseconds: pollTime(), besides: mailbox.descriptor)
                    deliver()
                    checkTime()
                }
            }
        }

        private func beginWaiting() {
            var begun = 0
            while begun < waiting.count, flying.count < limit {
                let request = waiting[begun]
                request.inbox = inbox
                request.result = nil
                request.extents = []
                guard let handle, handle.begin(request) else {
                    // A connection that is over tells here first; anything else is the request's fault.
                    if handle?.isOver ?? true { break }
                    finish(request, EINVAL)
                    begun += 1
                    continue
                }
                if flying.isEmpty { lastAnswer = .now }
                flying.append(request)
                begun += 1
            }
            waiting.removeFirst(begun)
        }

        /// Passes on what has been answered.
        private func deliver() {
            guard !inbox.finished.isEmpty else { return }
            let finished = inbox.finished
            inbox.finished = []
            // What a dying connection leaves behind is asked for again.
            let isOver = handle?.isOver ?? true
            for request in finished {
                guard let result = request.result else { continue }
                if isOver, result != 0 { continue }
                flying.removeAll { $0 === request }
                failedAttempts = 0
                lastAnswer = .now
                finish(request, result)
            }
        }

        private func finish(_ request: NBDRequest, _ result: Int32) {
            guard result != 0 else {
                request.transfer?.finish()
                return
            }
            request.transfer?.finish(
                ImageError(
                    .system(errno: result), path: address.name,
                    "\(request.summary): " + String(cString: strerror(result))))
        }

        /// The connection has broken: what was in flight has to be asked for again.
        private func lose() {
            handle = nil
            waiting = flying + waiting
            flying = []
            inbox.finished = []
        }

        private func reconnect() {
            if failedAttempts > 0 { rest(milliseconds: Self.pause(failedAttempts)) }
            failedAttempts += 1
            do throws(ImageError) {
                let new = try NBDHandle(
                    address, timeout: options.timeout, isGivenUp: { mailbox.isAborted })
                guard new.facts.size == facts.size else {
                    throw ImageError(
                        .invalid, path: address.name,
                        "the export has another size after the connection was lost")
                }
                handle = new
                if failedAttempts > NBDConnection.attempts {
                    failure = ImageError(
                        .system(errno: ECONNRESET), path: address.name,
                        "the connection was lost \(NBDConnection.attempts) times without an answer")
                }
            } catch {
                guard failedAttempts >= NBDConnection.attempts else { return }
                failure = ImageError(
                    error.kind, path: error.path,
                    "the connection was lost and cannot be made anew: \(error.message)")
            }
        }

        private static func pause(_ attempt: Int) -> Int {
            NBDConnection.firstPause << (attempt - 1)
        }

        private func rest(milliseconds: Int) {
            for _ in 0..<milliseconds / 50 where !mailbox.isAborted { usleep(50_000) }
        }

        private func giveUp(_ error: any Error) {
            let lost = flying + waiting
            flying = []
            waiting = []
            inbox.finished = []
            // Before anybody takes back the memory that requests read into.
            handle = nil
            for request in lost { request.transfer?.finish(error) }
        }

        private func waitForMail() {
            var polled = pollfd(fd: mailbox.descriptor, events: Int16(POLLIN), revents: 0)
            poll(&polled, 1, -1)
        }

        private func pollTime() -> Int32 {
            guard options.timeout != nil, !flying.isEmpty else { return -1 }
            return 200
        }

        private func checkTime() {
            guard let timeout = options.timeout, !flying.isEmpty,
                ContinuousClock.now - lastAnswer >= .seconds(timeout)
            else { return }
            failure = ImageError(
                .system(errno: ETIMEDOUT), path: address.name,
                "the server has not answered for \(timeout) seconds")
        }
    }
}

/// Runs a body on a new thread with no ties to whoever starts it. Returns whether that was possible.
private func startThread(_ body: @escaping @Sendable () -> Void) -> Bool {
    final class Box {
        let body: @Sendable () -> Void
        init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }
    let box = Unmanaged.passRetained(Box(body))
    var thread = pthread_t()
    let status = pthread_create(
        &thread, nil,
        { context in
            guard let context else { return nil }
            Unmanaged<Box>.fromOpaque(context).takeRetainedValue().body()
            return nil
        }, box.toOpaque())
    guard status == 0 else {
        box.release()
        return false
    }
    pthread_detach(thread)
    return true
}
