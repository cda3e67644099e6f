import Glibc

/// The signals that a long command answers to, as a stream of numbers.
///
/// They are blocked in all threads, and the main thread does nothing but wait for them.
struct Signals: Sendable {
    private let awaited: sigset_t
    private let numbers: AsyncStream<Int32>
    private let continuation: AsyncStream<Int32>.Continuation

    /// To be made on the main thread, before there is any other: threads begin with what their maker
    /// has blocked.
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

    /// Whoever started us with a signal ignored (nohup) wants it so.
    fileprivate static func isIgnored(_ number: Int32) -> Bool {
        var action = sigaction()
        sigaction(number, nil, &action)
        return unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self)
            == unsafeBitCast(SIG_IGN, to: Int.self)
    }

    /// Waits for signals, and puts them into the stream, until the process ends.
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

    /// The same for a body that finds something out.
    func result<Value: Sendable>(
        of body: @escaping @Sendable () async throws -> Value,
        onStatus: @escaping @Sendable () -> Void
    ) async throws -> Value {
        let (values, continuation) = AsyncStream.makeStream(of: Value.self)
        try await interrupting(
            {
                continuation.yield(try await body())
                continuation.finish()
            }, onStatus: onStatus)
        for await value in values { return value }
        throw CancellationError()
    }

    /// Runs a body, and cancels it when a signal asks for an end.
    ///
    /// - Parameter onStatus: called at SIGUSR1.
    /// - Throws: `Interruption` after such a signal, once the body has cleaned up; what the body throws.
    func interrupting(
        _ body: @escaping @Sendable () async throws -> Void,
        onStatus: @escaping @Sendable () -> Void
    ) async throws {
        try await withThrowingTaskGroup(of: Int32?.self) { group in
            group.addTask {
                try await body()
                return nil
            }
            group.addTask {
                for await number in numbers {
                    if number != SIGUSR1 { return number }
                    onStatus()
                }
                return nil
            }
            let first = try await group.next() ?? nil
            group.cancelAll()
            guard let signal = first else { return }
            // The body may still have finished its work before it saw the cancellation.
            while let result = await group.nextResult() {
                if case .success = result { return }
            }
            throw Interruption(signal: signal)
        }
    }
}

/// SIGPIPE, which comes back as an error of the write that met it.
enum PipeSignal {
    private static let wasIgnored = Signals.isIgnored(SIGPIPE)

    static func ignore() {
        _ = wasIgnored
        signal(SIGPIPE, SIG_IGN)
    }

    /// Ends the process as the signal would have ended it. Returns if the signal was ignored or
    /// blocked from the start.
    static func end() {
        guard !wasIgnored else { return }
        signal(SIGPIPE, SIG_DFL)
        raise(SIGPIPE)
    }
}
