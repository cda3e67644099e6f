import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// One connection to a server, with many requests in flight and nobody who waits in a system call for
/// them but the loop that it belongs to.
///
/// A request is sent by the thread that has it, and who waited for an answer goes on in the thread that
/// received it: between two servers on this machine waking threads would take longer than all else.
///
/// A connection that breaks is made anew, and what was in flight on it is asked for once more. That is
/// safe for writes, too: each says what a range is to hold, and no two of them overlap. A trim does not say that, so it is
/// not repeated but fails.
final class NBDConnection: @unchecked Sendable {
    /// How often a connection is made anew without a single answer in between.
    private static let attempts = 6
    /// The first pause before that, in milliseconds; each further one is twice as long.
    private static let firstPause = 100

    let loop: NBDLoop
    let facts: NBDHandle.Facts
    /// How many requests may be in flight.
    let limit: Int
    /// How many have been submitted and not been answered.
    let load = Atomic<Int>(0)
    private let address: NBDAddress
    private let timeout: Int?
    private let mailbox = NBDMailbox()
    /// The loop is to look at this connection.
    private let isCalled = Atomic<Bool>(false)
    /// Held by whoever uses the connection, mostly the loop.
    private let access = Mutex(())
    // Guarded by `access`:
    private let inbox = NBDInbox()
    /// nil while the connection is made anew, and once it has been given up.
    private var handle: NBDHandle?
    private var isReconnecting = false
    private var waiting: [NBDRequest] = []
    private var flying: [NBDRequest] = []
    private var answers: [NBDAnswer] = []
    private var failedAttempts = 0
    private var lastAnswer = ContinuousClock.now
    /// Set when the connection has been given up.
    private var failure: (any Error)?

    /// Of the loop's thread: nothing more will come.
    private(set) var hasEnded = false

    /// Connects. It has to be closed when nobody needs it any more.
    init(_ address: NBDAddress, _ options: NBDOptions, loop: NBDLoop) throws(ImageError) {
        let handle = try NBDHandle(
            address, timeout: options.timeout, isGivenUp: { Task.isCancelled })
        self.handle = handle
        facts = handle.facts
        limit = options.requests(to: address)
        timeout = options.timeout
        self.address = address
        self.loop = loop
        loop.add(self)
    }

    /// Hands a request over, to be answered through its transfer. It is sent at once if nobody else is busy with
    /// the connection; who is looks for it afterwards.
    func submit(_ request: NBDRequest) {
        load.add(1, ordering: .relaxed)
        guard mailbox.post(request) else {
            load.subtract(1, ordering: .relaxed)
            request.transfer?.finish(CancellationError())
            return
        }
        while !mailbox.isEmpty {
            let passed = access.withLockIfAvailable { _ -> [NBDAnswer]? in
                guard let handle, failure == nil else {
                    call()
                    return nil
                }
                waiting += mailbox.take().requests
                beginWaiting()
                deliver()
                // What did not fit into the socket is for the thread that waits for it.
                let isUndone = !waiting.isEmpty && flying.count < limit
                if handle.isOver || handle.wantsToWrite || isUndone { call() }
                return takeAnswers()
            }
            guard let passed, let passed else { return }
            for answer in passed { answer.tell() }
        }
    }

    /// Gives up everything that is in flight; the connection is of no use afterwards.
    func abort() {
        mailbox.abort()
        call()
    }

    /// Says goodbye, if nobody is busy with the connection at this moment. This can be the loop's own thread, lent
    /// to whoever was the last to need the connection, and a server that is waited for next wants to hear it.
    func close() {
        access.withLockIfAvailable { _ in
            if flying.isEmpty, waiting.isEmpty { handle?.disconnect() }
        }
        mailbox.close()
        call()
    }

    private func call() {
        isCalled.store(true, ordering: .sequentiallyConsistent)
        loop.call()
    }

    // MARK: For the loop

    func takeCall() -> Bool { isCalled.exchange(false, ordering: .sequentiallyConsistent) }

    /// Nobody has left a request since the connection was last advanced.
    var isIdle: Bool { mailbox.isEmpty }

    /// It has to be advanced now and then, to find that the server is silent.
    var isTimed: Bool { timeout != nil }

    /// Does what there is to do without waiting for the server.
    ///
    /// - Parameter events: what `poll` found.
    /// - Returns: what to wait for, and whom to tell.
    func advance(after events: Int16) -> (wish: pollfd, answers: [NBDAnswer]) {
        access.withLock { _ in
            if events != 0 {
                // A long answer comes in parts: each is a sign of life.
                lastAnswer = .now
                handle?.notify(events)
            }
            let mail = mailbox.take()
            waiting += mail.requests
            deliver()
            if mail.isAborted { failure = failure ?? CancellationError() }
            checkTime()
            while failure == nil, !isReconnecting, handle?.isOver ?? true {
                lose()
                if mail.isClosed, waiting.isEmpty { break }
                beginReconnecting()
            }
            if let failure { giveUp(failure) }
            beginWaiting()
            deliver()
            let isAtEnd = mail.isClosed && flying.isEmpty && waiting.isEmpty
            if isAtEnd { handle?.disconnect() }
            if isAtEnd || mail.isAborted { hasEnded = true }
            if let handle, handle.isOver { isCalled.store(true, ordering: .sequentiallyConsistent) }
            return (handle?.wish ?? NBDHandle.noWish, takeAnswers())
        }
    }

    private func takeAnswers() -> [NBDAnswer] {
        defer { answers = [] }
        return answers
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
        load.subtract(1, ordering: .relaxed)
        answers.append(NBDAnswer(transfer: request.transfer, error: error))
    }

    /// The connection has broken: what was in flight has to be asked for again.
    private func lose() {
        handle = nil
        for request in flying where request.isTrim { answer(request, ECONNRESET) }
        waiting = flying.filter { !$0.isTrim } + waiting
        flying = []
        inbox.finished = []
    }

    private func giveUp(_ error: any Error) {
        let lost = flying + waiting
        flying = []
        waiting = []
        inbox.finished = []
        // Before anybody takes back the memory that requests read into.
        handle = nil
        load.subtract(lost.count, ordering: .relaxed)
        answers += lost.map { NBDAnswer(transfer: $0.transfer, error: error) }
    }

    private func checkTime() {
        guard let timeout, !flying.isEmpty, ContinuousClock.now - lastAnswer >= .seconds(timeout)
        else { return }
        failure = ImageError(
            .system(errno: ETIMEDOUT), path: address.name,
            "the server has not answered for \(timeout) seconds")
    }

    // MARK: Connecting anew

    /// On a thread of its own: the loop's other connections go on meanwhile.
    private func beginReconnecting() {
        isReconnecting = true
        let pause = failedAttempts == 0 ? 0 : Self.firstPause << (failedAttempts - 1)
        failedAttempts += 1
        let status = startThread { [self] in
            for _ in 0..<pause / 50 where !mailbox.isAborted { usleep(50_000) }
            let result = Result { () throws(ImageError) in
                try NBDHandle(address, timeout: timeout, isGivenUp: { mailbox.isAborted })
            }
            access.withLock { _ in
                isReconnecting = false
                finishReconnecting(result)
            }
            call()
        }
        guard status != 0 else { return }
        isReconnecting = false
        finishReconnecting(
            .failure(ImageError(.system(errno: status), String(cString: strerror(status)))))
    }

    private func finishReconnecting(_ result: Result<NBDHandle, ImageError>) {
        guard failure == nil else { return }
        do throws(ImageError) {
            let new = try result.get()
            guard new.facts.size == facts.size else {
                throw ImageError(
                    .invalid, path: address.name,
                    "the export has another size after the connection was lost")
            }
            guard failedAttempts <= Self.attempts else {
                failure = ImageError(
                    .system(errno: ECONNRESET), path: address.name,
                    "the connection was lost \(Self.attempts) times without an answer")
                return
            }
            handle = new
        } catch {
            guard failedAttempts >= Self.attempts else { return }
            failure = ImageError(
                error.kind, path: error.path,
                "the connection was lost and cannot be made anew: \(error.message)")
        }
    }
}

/// How a request ended, to be told once nothing is locked.
struct NBDAnswer {
    let transfer: NBDTransfer?
    let error: (any Error)?

    func tell() { transfer?.finish(error) }
}
