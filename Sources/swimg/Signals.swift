import DiskImage
import Glibc

/// The signals that a long command answers to, as a stream of numbers.
///
/// They are blocked in every thread and fetched by one of their own, so no handler ever runs in the
/// middle of something. Make this before any other thread starts.
struct Signals: Sendable {
    private let numbers: AsyncStream<Int32>

    init() {
        // Both come back as errors of the write that met them.
        signal(SIGPIPE, SIG_IGN)
        signal(SIGXFSZ, SIG_IGN)
        var set = sigset_t()
        sigemptyset(&set)
        for number in [SIGINT, SIGTERM, SIGHUP, SIGUSR1] where !Self.isIgnored(number) {
            sigaddset(&set, number)
        }
        pthread_sigmask(SIG_BLOCK, &set, nil)
        let (stream, continuation) = AsyncStream.makeStream(of: Int32.self)
        numbers = stream
        Self.startThread(waitingFor: set) { continuation.yield($0) }
    }

    /// Whoever started us with a signal ignored (nohup) wants it so.
    private static func isIgnored(_ number: Int32) -> Bool {
        var action = sigaction()
        sigaction(number, nil, &action)
        return unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self)
            == unsafeBitCast(SIG_IGN, to: Int.self)
    }

    private final class Waiter {
        var set: sigset_t
        let report: @Sendable (Int32) -> Void

        init(_ set: sigset_t, _ report: @escaping @Sendable (Int32) -> Void) {
            self.set = set
            self.report = report
        }
    }

    private static func startThread(
        waitingFor set: sigset_t, _ report: @escaping @Sendable (Int32) -> Void
    ) {
        let waiter = Unmanaged.passRetained(Waiter(set, report))
        var thread = pthread_t()
        let status = pthread_create(
            &thread, nil,
            { context in
                guard let context else { return nil }
                let waiter = Unmanaged<Waiter>.fromOpaque(context).takeRetainedValue()
                var number: Int32 = 0
                while sigwait(&waiter.set, &number) == 0 { waiter.report(number) }
                return nil
            }, waiter.toOpaque())
        // Without the thread signals would be lost: let them do what they do by default.
        if status == 0 {
            pthread_detach(thread)
        } else {
            waiter.release()
            var set = set
            pthread_sigmask(SIG_UNBLOCK, &set, nil)
        }
    }

    /// Runs a body, and cancels it when a signal asks for an end.
    ///
    /// - Parameter onStatus: called at SIGUSR1.
    /// - Throws: `Interruption` after such a signal, once the body has cleaned up; what the body throws.
    func interrupting(
        onStatus: @escaping @Sendable () -> Void,
        _ body: @escaping @Sendable () async throws -> Void
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
