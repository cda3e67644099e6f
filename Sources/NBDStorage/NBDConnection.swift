import CLinux
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// One connection to a server, and the thread that waits for its answers: many requests are in flight, and nobody
/// else waits in a system call for them.
///
/// A request is sent by the thread that has it, and who waited for an answer goes on in the thread that
/// received it: between two servers on this machine waking threads would take longer than all else.
///
/// A connection that breaks is made anew, and what was in flight on it is asked for once more. That is
/// safe for writes, too: each says what a range is to hold, and no two of them overlap.
final class NBDConnection: Sendable {
    /// How often a connection is made anew without a single answer in between.
    fileprivate static let attempts = 6
    /// The first pause before that, in milliseconds; each further one is twice as long.
    fileprivate static let firstPause = 100

    let facts: NBDHandle.Facts
    private let driver: Driver

    /// Connects, and starts the thread.
    init(_ address: NBDAddress, _ options: NBDOptions) throws(ImageError) {
        let handle = try NBDHandle(
            address, timeout: options.timeout, isGivenUp: { Task.isCancelled })
        facts = handle.facts
        let driver = Driver(handle, address, options, try Mailbox(name: address.name))
        self.driver = driver
        guard startThread({ driver.run() }) else {
            throw ImageError(
                .system(errno: EAGAIN), path: address.name, "cannot start a thread")
        }
    }

    deinit { driver.close() }

    /// Hands a request over. It is answered through its transfer.
    func submit(_ request: NBDRequest) { driver.submit(request) }

    /// Gives up everything that is in flight; the connection is of no use afterwards.
    func abort() { driver.mailbox.abort() }
}

/// What other threads leave for a connection, and how they wake its thread.
private final class Mailbox: Sendable {
    struct Content {
        var requests: [NBDRequest] = []
        /// No more will come.
        var isClosed = false
        var isAborted = false
    }

    let descriptor: Int32
    private let content = Mutex(Content())
    private let hasRequests = Atomic<Bool>(false)

    init(name: String) throws(ImageError) {
        descriptor = clinux_eventfd()
        guard descriptor >= 0 else {
            throw ImageError(
                .system(errno: errno), path: name,
                "cannot connect: " + String(cString: strerror(errno)))
        }
    }

    deinit { _ = Glibc.close(descriptor) }

    /// - Returns: false if nothing is accepted any more.
    func post(_ request: NBDRequest) -> Bool {
        content.withLock {
            guard !$0.isAborted else { return false }
            $0.requests.append(request)
            hasRequests.store(true, ordering: .sequentiallyConsistent)
            return true
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

    /// Wakes the connection's thread.
    func ring() {
        var one: UInt64 = 1
        _ = Glibc.write(descriptor, &one, MemoryLayout<UInt64>.size)
    }

    /// To be called when the descriptor can be read.
    func silence() {
        var count: UInt64 = 0
        _ = Glibc.read(descriptor, &count, MemoryLayout<UInt64>.size)
    }

    var isEmpty: Bool { !hasRequests.load(ordering: .sequentiallyConsistent) }

    var isAborted: Bool { content.withLock { $0.isAborted } }

    func take() -> Content {
        content.withLock { content in
            defer { content.requests = [] }
            hasRequests.store(false, ordering: .sequentiallyConsistent)
            return content
        }
    }
}

/// The state of a connection: used by whoever holds `access`, mostly the connection's own thread.
private final class Driver: @unchecked Sendable {
    /// How many answers are passed on to other threads after one that took long in this one.
    private static let answersAfterLongWork = 64

    /// How a request ended, to be told once nothing is locked.
    private struct Answer {
        let transfer: NBDTransfer?
        let error: (any Error)?
    }

    /// What the connection's thread does next.
    private enum Next {
        case again, end, waitForMail
        case wait(NBDHandle, events: Int16)
    }

    let mailbox: Mailbox
    private let address: NBDAddress
    private let options: NBDOptions
    /// How many requests may be in flight.
    private let limit: Int
    private let facts: NBDHandle.Facts
    private let access = Mutex(())
    // Guarded by `access`:
    private let inbox = NBDInbox()
    private var handle: NBDHandle?
    private var waiting: [NBDRequest] = []
    private var flying: [NBDRequest] = []
    private var answers: [Answer] = []
    private var failedAttempts = 0
    private var lastAnswer = ContinuousClock.now
    /// Set when the connection has been given up.
    private var failure: (any Error)?

    // Of the connection's own thread:
    /// How many more times others go on elsewhere, because they took long here.
    private var answersElsewhere = 0

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

    /// Sends a request at once if nobody else is busy with the connection; who is looks for it afterwards.
    func submit(_ request: NBDRequest) {
        guard mailbox.post(request) else {
            request.transfer?.finish(CancellationError())
            return
        }
        while !mailbox.isEmpty {
            let passed = access.withLockIfAvailable { _ -> [Answer]? in
                guard let handle, failure == nil else {
                    mailbox.ring()
                    return nil
                }
                waiting += mailbox.take().requests
                beginWaiting()
                deliver()
                // What did not fit into the socket is for the thread that waits for it.
                let isUndone = !waiting.isEmpty && flying.count < limit
                if handle.isOver || handle.wantsToWrite || isUndone { mailbox.ring() }
                return takeAnswers()
            }
            guard let passed, let passed else { return }
            Self.tell(passed)
        }
    }

    /// Says goodbye, if nobody does at this moment. This can be the connection's own thread, lent to whoever
    /// was the last to need the connection, and a server that is waited for next wants to hear it.
    func close() {
        access.withLockIfAvailable { _ in
            if flying.isEmpty, waiting.isEmpty { handle?.disconnect() }
        }
        mailbox.close()
    }

    func run() {
        while true {
            let (next, answers) = access.withLock { _ in (advance(), takeAnswers()) }
            pass(answers)
            switch next {
            case .again: continue
            case .end: return
            case .waitForMail:
                guard mailbox.isEmpty else { continue }
                var polled = pollfd(fd: mailbox.descriptor, events: Int16(POLLIN), revents: 0)
                poll(&polled, 1, -1)
                mailbox.silence()
            case .wait(let handle, let events):
                // Whoever posted while the lock was held has left the sending to this thread.
                guard mailbox.isEmpty else { continue }
                let happened = handle.poll(
                    events, milliseconds: pollTime, besides: mailbox.descriptor)
                if happened.besides { mailbox.silence() }
                access.withLock { _ in
                    if happened.events != 0 {
                        // A long answer comes in parts: each is a sign of life.
                        lastAnswer = .now
                        handle.notify(happened.events)
                    }
                    deliver()
                    checkTime()
                }
            }
        }
    }

    /// Tells those who wait, and lets them go on in this thread if that is soon done: meanwhile
    /// nobody reads what the server sends.
    private func pass(_ answers: [Answer]) {
        guard !answers.isEmpty else { return }
        guard answersElsewhere == 0 else {
            answersElsewhere -= 1
            return Self.tell(answers)
        }
        if !IOExecutor.lendThread(after: { Self.tell(answers) }) {
            answersElsewhere = Self.answersAfterLongWork
        }
    }

    private static func tell(_ answers: [Answer]) {
        for answer in answers { answer.transfer?.finish(answer.error) }
    }

    private func takeAnswers() -> [Answer] {
        defer { answers = [] }
        return answers
    }

    /// Does what there is to do without waiting for the server.
    private func advance() -> Next {
        let mail = mailbox.take()
        waiting += mail.requests
        if mail.isAborted { failure = failure ?? CancellationError() }
        if mail.isClosed, handle == nil, flying.isEmpty, waiting.isEmpty { return .end }
        if failure == nil, handle == nil { reconnect() }
        if let failure {
            giveUp(failure)
            return mail.isClosed || mail.isAborted ? .end : .waitForMail
        }
        beginWaiting()
        deliver()
        if mail.isClosed, flying.isEmpty, waiting.isEmpty {
            handle?.disconnect()
            return .end
        }
        guard let handle, !handle.isOver else {
            lose()
            return .again
        }
        guard waiting.isEmpty || flying.count >= limit else { return .again }
        return .wait(handle, events: handle.wantedEvents)
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
                answer(request, EINVAL)
                begun += 1
                continue
            }
            if flying.isEmpty { lastAnswer = .now }
            flying.append(request)
            begun += 1
        }
        waiting.removeFirst(begun)
    }

    /// Notes what has been answered.
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
            answer(request, result)
        }
    }

    private func answer(_ request: NBDRequest, _ result: Int32) {
        let error =
            result == 0
            ? nil
            : ImageError(
                .system(errno: result), path: address.name,
                "\(request.summary): " + String(cString: strerror(result)))
        answers.append(Answer(transfer: request.transfer, error: error))
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
        answers += lost.map { Answer(transfer: $0.transfer, error: error) }
    }

    /// In milliseconds. Requests are begun while this thread sleeps, so it has to look for overdue ones by itself.
    private var pollTime: Int32 { options.timeout == nil ? -1 : 200 }

    private func checkTime() {
        guard let timeout = options.timeout, !flying.isEmpty,
            ContinuousClock.now - lastAnswer >= .seconds(timeout)
        else { return }
        failure = ImageError(
            .system(errno: ETIMEDOUT), path: address.name,
            "the server has not answered for \(timeout) seconds")
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
