import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// One connection to a server, with many requests in flight. Only the thread of its loop waits for
/// them in a system call.
///
/// The thread that has a request sends it, and the waiting task goes on in the thread that received
/// the answer: between two servers on this machine, waking threads would take longer than all else.
///
/// `NBDConnectionState` decides what happens to the connection; this class carries it out. A lost
/// connection is an error unless the user allowed reconnecting (`NBDOptions.reconnectTime`). Then
/// the requests in flight are sent once more. A write can be repeated, because it says what a range
/// is to hold and no two writes overlap; a trim does not say that, so it fails. Writes that were
/// acknowledged before the loss are repeated by `NBDStorage.change`.
final class NBDConnection: @unchecked Sendable {
    private let loop: NBDLoop
    let facts: NBDHandle.Facts
    /// Largest number of requests in flight.
    let limit: Int
    /// Number of requests in flight up to which no other connection is made.
    let comfort: Int
    /// Number of requests that have been submitted and not answered.
    let load = Atomic<Int>(0)
    /// Whether the connection exists, or was asked for.
    private let isUsed: Atomic<Bool>
    /// Number of times that the connection was made anew.
    let renewals = Atomic<Int>(0)
    private let address: NBDAddress
    private let timeout: Int?
    private let mailbox = NBDMailbox()
    /// Whether the loop has to look at this connection.
    private let isCalled = Atomic<Bool>(false)
    /// Held by the thread that uses the connection, mostly the loop's.
    private let access = Mutex(())
    // Guarded by `access`:
    private var state: NBDConnectionState
    private let inbox = NBDInbox()
    /// nil unless the connection is open.
    private var handle: NBDHandle?
    private var waiting: [NBDRequest] = []
    private var flying: [NBDRequest] = []
    private var answers: [NBDAnswer] = []
    private var lastAnswer = ContinuousClock.now

    /// Whether nothing more will come. Only the loop's thread uses it.
    private(set) var hasEnded = false

    /// A connection that has to be closed when it is no longer needed.
    ///
    /// - Parameters:
    ///   - isServerLocal: whether the server is on this machine.
    ///   - handle: the open connection; nil makes one when the first request needs it.
    init(
        _ address: NBDAddress, _ options: NBDOptions, loop: NBDLoop, facts: NBDHandle.Facts,
        isServerLocal: Bool, handle: NBDHandle? = nil
    ) {
        self.handle = handle
        self.facts = facts
        state = NBDConnectionState(
            isOpen: handle != nil, reconnectTime: options.reconnectTime)
        isUsed = Atomic(handle != nil)
        limit = options.mostRequests
        comfort = min(limit, options.requests(isServerLocal: isServerLocal))
        timeout = options.timeout
        self.address = address
        self.loop = loop
        loop.add(self)
    }

    /// Hands a request over, to be answered through its transfer. The request is sent at once
    /// unless another thread uses the connection; that thread finds the request afterwards.
    func submit(_ request: NBDRequest) {
        load.add(1, ordering: .relaxed)
        if !isOpened { isUsed.store(true, ordering: .relaxed) }
        guard mailbox.post(request) else {
            load.subtract(1, ordering: .relaxed)
            request.transfer?.finish(CancellationError())
            return
        }
        while !mailbox.isEmpty {
            let passed = access.withLockIfAvailable { _ -> [NBDAnswer]? in
                guard let handle, state.phase == .open else {
                    call()
                    return nil
                }
                waiting += mailbox.take().requests
                beginWaiting()
                deliver()
                // The loop's thread sends what did not fit into the socket.
                let isUndone = !waiting.isEmpty && flying.count < limit
                if handle.isOver || handle.wantsToWrite || isUndone { call() }
                return takeAnswers()
            }
            guard let passed, let passed else { return }
            for answer in passed { answer.tell() }
        }
    }

    /// Gives up all that is in flight; the connection is of no use afterwards.
    func abort() {
        mailbox.abort()
        call()
    }

    /// Says goodbye as soon as nothing is in flight. That is at once if no other thread uses the
    /// connection, because a server that is waited for next has to get the goodbye.
    func close() {
        mailbox.close()
        access.withLockIfAvailable { _ in closeIfIdle() }
        call()
    }

    /// Whether a request has needed the connection.
    var isOpened: Bool { isUsed.load(ordering: .relaxed) }

    private func call() {
        isCalled.store(true, ordering: .sequentiallyConsistent)
        loop.call()
    }

    // MARK: For the loop

    func takeCall() -> Bool { isCalled.exchange(false, ordering: .sequentiallyConsistent) }

    /// Whether no request was left since the connection was last advanced.
    var isIdle: Bool { mailbox.isEmpty }

    /// Whether the connection has to be advanced now and then, to notice a silent server.
    var isTimed: Bool { timeout != nil }

    /// Does all that can be done without waiting for the server.
    ///
    /// - Parameter events: events that `poll` found.
    /// - Returns: the events to wait for, and the answers to give.
    func advance(after events: Int16) -> (wish: pollfd, answers: [NBDAnswer]) {
        access.withLock { _ in
            if events != 0 {
                // A long answer comes in parts, each of which shows that the server is alive.
                lastAnswer = .now
                handle?.notify(events)
            }
            let mail = mailbox.take()
            waiting += mail.requests
            deliver()
            if mail.isAborted { perform(state.abort()) }
            checkTime()
            noteLoss()
            if !waiting.isEmpty { perform(state.needed(at: .now)) }
            if mail.isClosed { closeIfIdle() }
            hasEnded = state.phase == .ended
            // The connection ended while requests were sent; nothing else would wake the loop.
            if let handle, handle.isOver { call() }
            return (handle?.wish ?? NBDHandle.noWish, takeAnswers())
        }
    }

    private func perform(_ action: NBDConnectionState.Action) {
        switch action {
        case .nothing: break
        case .send:
            beginWaiting()
            deliver()
        case .connect(let pause): beginConnecting(after: pause)
        case .fail(let error): giveUp(error)
        case .cancel: giveUp(CancellationError())
        case .sayGoodbye:
            handle?.disconnect()
            handle = nil
            state.gone()
        }
    }

    private func closeIfIdle() {
        let isIdle = flying.isEmpty && waiting.isEmpty && mailbox.isEmpty
        perform(state.close(isIdle: isIdle))
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
                // A connection that has ended keeps the request; other refusals are the request's
                // fault.
                guard let handle, !handle.isOver else { break }
                answer(request, handle.refusal(of: request))
                begun += 1
                continue
            }
            if flying.isEmpty { lastAnswer = .now }
            flying.append(request)
            begun += 1
        }
        waiting.removeFirst(begun)
    }

    /// Takes the answers that have come.
    private func deliver() {
        guard !inbox.finished.isEmpty else { return }
        let finished = inbox.finished
        inbox.finished = []
        // Requests that failed because the connection ended are sent again.
        let isOver = handle?.isOver ?? true
        for request in finished {
            guard let result = request.result else { continue }
            if isOver, result != 0 { continue }
            flying.removeAll { $0 === request }
            state.answered()
            lastAnswer = .now
            answer(
                request,
                result == 0
                    ? nil : Syscall.failure(address.name, request.summary, errno: result))
        }
    }

    private func answer(_ request: NBDRequest, _ error: ImageError?) {
        load.subtract(1, ordering: .relaxed)
        answers.append(NBDAnswer(transfer: request.transfer, error: error))
    }

    /// Handles a broken connection: the requests in flight have to be sent again, or fail.
    private func noteLoss() {
        guard let loss = handle?.loss else { return }
        handle = nil
        for request in flying where request.isTrim { answer(request, loss.error) }
        waiting = flying.filter { !$0.isTrim } + waiting
        flying = []
        inbox.finished = []
        perform(
            state.broken(
                loss.error, isBusy: !waiting.isEmpty, isFinal: loss.isServersFault, at: .now))
    }

    private func giveUp(_ error: any Error) {
        let lost = flying + waiting
        flying = []
        waiting = []
        inbox.finished = []
        // Closes the connection before tasks take back the memory that requests read into.
        handle = nil
        load.subtract(lost.count, ordering: .relaxed)
        answers += lost.map { NBDAnswer(transfer: $0.transfer, error: error) }
    }

    private func checkTime() {
        guard let timeout, !flying.isEmpty, ContinuousClock.now - lastAnswer >= .seconds(timeout)
        else { return }
        perform(
            state.timedOut(
                ImageError(
                    .system(errno: ECONNABORTED), path: address.name,
                    "the server has not answered for \(timeout) seconds")))
    }

    // MARK: Connecting anew

    /// Connects on a separate thread, so that the loop's other connections go on meanwhile.
    private func beginConnecting(after pause: Int) {
        let status = startThread { [self] in
            for _ in 0..<pause / 50 where !mailbox.isAborted { usleep(50_000) }
            let result = Result { () throws(ImageError) in
                try NBDHandle(address, timeout: timeout, isGivenUp: { mailbox.isAborted })
            }
            access.withLock { _ in finishConnecting(result) }
            call()
        }
        guard status != 0 else { return }
        let error = Syscall.failure(
            address.name, "cannot start a thread to connect", errno: status)
        perform(state.refused(error, isFinal: true, at: .now))
    }

    private func finishConnecting(_ result: Result<NBDHandle, ImageError>) {
        switch result {
        case .success(let new) where new.facts == facts:
            // If the state was aborted meanwhile, the new connection ends here.
            guard state.phase == .connecting else { return }
            handle = new
            if state.wasOpen { renewals.add(1, ordering: .sequentiallyConsistent) }
            perform(state.connected())
        case .success:
            let changed = ImageError(
                .invalid, path: address.name, "the export changed while the connection was lost")
            perform(state.refused(changed, isFinal: true, at: .now))
        case .failure(let error):
            let what = state.wasOpen ? "the connection was lost, and connecting anew failed: " : ""
            let refusal = ImageError(
                error.kind, path: address.name, "\(what)\(error.message)")
            perform(state.refused(refusal, at: .now))
        }
    }
}

/// The end of a request, which is told once nothing is locked.
struct NBDAnswer {
    let transfer: NBDTransfer?
    let error: (any Error)?

    func tell() { transfer?.finish(error) }
}
