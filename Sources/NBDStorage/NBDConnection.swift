import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// One connection to a server, with many requests in flight and no thread that waits in a system
/// call for them but that of the loop that it belongs to.
///
/// A request is sent by the thread that has it, and the task that waited for an answer goes on in
/// the thread that received it: between two servers on this machine waking threads would take
/// longer than all else.
///
/// `NBDConnectionState` says what happens to the connection; this is the shell around it. A lost
/// connection is an error unless the user allowed to make it anew (`NBDOptions.reconnectTime`).
/// Then the requests that were in flight are sent once more. A write says what a range is to hold
/// and no two of them overlap, so it can be repeated; a trim does not say that, so it fails. What
/// was acknowledged before is the concern of `NBDStorage.change`.
final class NBDConnection: @unchecked Sendable {
    private let loop: NBDLoop
    let facts: NBDHandle.Facts
    /// The server is on this machine.
    let isServerLocal: Bool
    /// How many requests may be in flight.
    let limit: Int
    /// The number of requests in flight that is enough before another connection is made.
    let comfort: Int
    /// How many have been submitted and not been answered.
    let load = Atomic<Int>(0)
    /// The connection is there, or was asked for.
    private let isUsed: Atomic<Bool>
    /// The number of times that the connection was made anew.
    let renewals = Atomic<Int>(0)
    private let address: NBDAddress
    private let timeout: Int?
    private let mailbox = NBDMailbox()
    /// The loop is to look at this connection.
    private let isCalled = Atomic<Bool>(false)
    /// Held by whoever uses the connection, mostly the loop.
    private let access = Mutex(())
    // Guarded by `access`:
    private var state: NBDConnectionState
    private let inbox = NBDInbox()
    /// nil unless the connection stands.
    private var handle: NBDHandle?
    private var waiting: [NBDRequest] = []
    private var flying: [NBDRequest] = []
    private var answers: [NBDAnswer] = []
    private var lastAnswer = ContinuousClock.now

    /// Of the loop's thread: nothing more will come.
    private(set) var hasEnded = false

    /// Connects. The connection has to be closed when it is not needed any more.
    convenience init(_ address: NBDAddress, _ options: NBDOptions, loop: NBDLoop) throws(ImageError)
    {
        let handle = try NBDHandle(
            address, timeout: options.timeout, isGivenUp: { Task.isCancelled })
        self.init(
            address, options, loop: loop, facts: handle.facts,
            isServerLocal: handle.isServerLocal, handle: handle)
    }

    /// Another connection to an export, which is made when the first request needs it.
    ///
    /// - Parameter first: one that stands, and says what the export is.
    convenience init(
        _ address: NBDAddress, _ options: NBDOptions, loop: NBDLoop, besides first: NBDConnection
    ) {
        self.init(
            address, options, loop: loop, facts: first.facts, isServerLocal: first.isServerLocal,
            handle: nil)
    }

    private init(
        _ address: NBDAddress, _ options: NBDOptions, loop: NBDLoop, facts: NBDHandle.Facts,
        isServerLocal: Bool, handle: NBDHandle?
    ) {
        self.handle = handle
        self.facts = facts
        self.isServerLocal = isServerLocal
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

    /// Hands a request over, to be answered through its transfer. It is sent at once if nobody else is busy with
    /// the connection; who is looks for it afterwards.
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

    /// Says goodbye as soon as nothing is in flight: at once, if no other thread is busy with the
    /// connection: a server that is waited for next wants to hear it.
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
            if mail.isAborted { perform(state.abort()) }
            checkTime()
            noteLoss()
            if !waiting.isEmpty { perform(state.needed(at: .now)) }
            if mail.isClosed { closeIfIdle() }
            hasEnded = state.phase == .ended
            // It ended while requests were sent: nothing would wake the loop for it.
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
                // A connection that is over tells here first; anything else is the request's fault.
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
            state.answered()
            lastAnswer = .now
            answer(
                request,
                result == 0
                    ? nil
                    : ImageError(
                        .system(errno: result), path: address.name,
                        "\(request.summary): " + String(cString: strerror(result))))
        }
    }

    private func answer(_ request: NBDRequest, _ error: ImageError?) {
        load.subtract(1, ordering: .relaxed)
        answers.append(NBDAnswer(transfer: request.transfer, error: error))
    }

    /// Finds out whether the connection has broken: what was in flight has to be sent again, or
    /// fails.
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
        // Before anybody takes back the memory that requests read into.
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
                    .system(errno: ETIMEDOUT), path: address.name,
                    "the server has not answered for \(timeout) seconds")))
    }

    // MARK: Connecting anew

    /// Connects on a thread of its own: the loop's other connections go on meanwhile.
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
        let error = ImageError(
            .system(errno: status), path: address.name,
            "cannot start a thread to connect: \(String(cString: strerror(status)))")
        perform(state.refused(error, isFinal: true, at: .now))
    }

    private func finishConnecting(_ result: Result<NBDHandle, ImageError>) {
        switch result {
        case .success(let new) where new.facts == facts:
            // Aborted meanwhile, the new connection ends here.
            guard state.phase == .connecting else { return }
            handle = new
            if state.wasOpen { renewals.add(1, ordering: .sequentiallyConsistent) }
            perform(state.connected())
        case .success:
            let changed = ImageError(
                .invalid, path: address.name, "a new connection shows another export")
            perform(state.refused(changed, isFinal: true, at: .now))
        case .failure(let error):
            let what = state.wasOpen ? "the connection was lost and cannot be made anew: " : ""
            let refusal = ImageError(
                error.kind, path: address.name, "\(what)\(error.message)")
            perform(state.refused(refusal, at: .now))
        }
    }
}

/// How a request ended, to be told once nothing is locked.
struct NBDAnswer {
    let transfer: NBDTransfer?
    let error: (any Error)?

    func tell() { transfer?.finish(error) }
}
