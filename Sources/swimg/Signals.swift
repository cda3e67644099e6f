import Glibc

/// Delivery of the signals that a long-running command handles, as a stream of signal numbers.
///
/// All threads block these signals; the main thread only waits for them.
struct Signals: Sendable {
    private let awaited: sigset_t
    private let numbers: AsyncStream<Int32>
    private let continuation: AsyncStream<Int32>.Continuation

    /// Must run on the main thread before any other thread exists, because threads inherit the
    /// signal mask of the thread that creates them.
    init() {
        var awaited = sigset_t()
        sigemptyset(&awaited)
        for number in [SIGINT, SIGTERM, SIGHUP, SIGUSR1] where !Self.isIgnored(number) {
            sigaddset(&awaited, number)
        }
        pthread_sigmask(SIG_BLOCK, &awaited, nil)
        self.awaited = awaited
        (numbers, continuation) = AsyncStream.makeStream(of: Int32.self)
    }

    /// Whether the parent process started this one with the signal ignored (nohup does): then it
    /// stays ignored.
    fileprivate static func isIgnored(_ number: Int32) -> Bool {
        var action = sigaction()
        sigaction(number, nil, &action)
        return unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self)
            == unsafeBitCast(SIG_IGN, to: Int.self)
    }

    /// Waits for signals and puts them into the stream until the process ends.
    func deliver() -> Never {
        while true {
            var number: Int32 = 0
            if withUnsafePointer(to: awaited, { sigwait($0, &number) }) == 0 {
                continuation.yield(number)
            } else {
                pause()
            }
        }
    }

    /// Runs a body and cancels it when a signal asks the command to end.
    ///
    /// - Parameter onStatus: called on SIGUSR1.
    /// - Throws: `Interruption` after such a signal, once the body has cleaned up; otherwise what
    ///   the body throws.
    func interrupting<Value: Sendable>(
        _ body: @escaping @Sendable () async throws -> Value,
        onStatus: @escaping @Sendable () -> Void = {}
    ) async throws -> Value {
        try await withThrowingTaskGroup(of: Result<Value, Interruption>.self) { group in
            group.addTask { .success(try await body()) }
            group.addTask {
                for await number in numbers {
                    if number != SIGUSR1 { return .failure(Interruption(signal: number)) }
                    onStatus()
                }
                throw CancellationError()
            }
            guard let first = try await group.next() else { throw CancellationError() }
            group.cancelAll()
            // The body may have finished its work before it noticed the cancellation.
            if case .failure = first, case .success(let second)? = await group.nextResult() {
                return try second.get()
            }
            return try first.get()
        }
    }

    /// Runs a body as `interrupting` does, and ends the display of its progress.
    ///
    /// - Parameters:
    ///   - printer: nil shows nothing, on SIGUSR1 neither.
    ///   - finish: completes the display after a success; nil shows that all is done.
    func interrupting<Value: Sendable>(
        showing printer: ProgressPrinter?, _ body: @escaping @Sendable () async throws -> Value,
        finish: ((Value) -> Void)? = nil
    ) async throws -> Value {
        let value: Value
        do {
            value = try await interrupting(body, onStatus: { printer?.printStatus() })
        } catch {
            printer?.giveUp()
            throw error
        }
        if let finish { finish(value) } else { printer?.finish() }
        return value
    }
}

/// SIGPIPE handling: the signal is ignored, so that the failed write reports EPIPE instead.
enum PipeSignal {
    private static let wasIgnored = Signals.isIgnored(SIGPIPE)

    static func ignore() {
        _ = wasIgnored
        signal(SIGPIPE, SIG_IGN)
    }

    /// Ends the process as SIGPIPE would have ended it. Returns if the signal was ignored or
    /// blocked when the process started.
    static func end() {
        guard !wasIgnored else { return }
        signal(SIGPIPE, SIG_DFL)
        raise(SIGPIPE)
    }
}
