import CSystem
import Glibc

/// The signals that a long command answers to, as a stream of numbers.
///
/// A handler sends each through a pipe, and a thread of its own reads that. Blocking them in all threads
/// and waiting for them in one would be simpler, but the main thread of an asynchronous program waits in
/// `sigsuspend` with nothing blocked.
struct Signals: Sendable {
    private let numbers: AsyncStream<Int32>

    init() {
        // Both come back as errors of the write that met them.
        signal(SIGPIPE, SIG_IGN)
        signal(SIGXFSZ, SIG_IGN)
        let (stream, continuation) = AsyncStream.makeStream(of: Int32.self)
        numbers = stream
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { return }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        guard Self.startThread(reading: ends[0], { continuation.yield($0) }) else { return }
        for number in [SIGINT, SIGTERM, SIGHUP, SIGUSR1] where !Self.isIgnored(number) {
            _ = csystem_forward_signal(number, ends[1])
        }
    }

    /// Whoever started us with a signal ignored (nohup) wants it so.
    private static func isIgnored(_ number: Int32) -> Bool {
        var action = sigaction()
        sigaction(number, nil, &action)
        return unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self)
            == unsafeBitCast(SIG_IGN, to: Int.self)
    }

    private final class Reader {
        let descriptor: Int32
        let report: @Sendable (Int32) -> Void

        init(_ descriptor: Int32, _ report: @escaping @Sendable (Int32) -> Void) {
            self.descriptor = descriptor
            self.report = report
        }

        func run() {
            while true {
                var byte: UInt8 = 0
                let count = read(descriptor, &byte, 1)
                if count == 1 {
                    report(Int32(byte))
                } else if count == 0 || errno != EINTR {
                    return
                }
            }
        }
    }

    private static func startThread(
        reading descriptor: Int32, _ report: @escaping @Sendable (Int32) -> Void
    ) -> Bool {
        let reader = Unmanaged.passRetained(Reader(descriptor, report))
        var thread = pthread_t()
        let status = pthread_create(
            &thread, nil,
            { context in
                guard let context else { return nil }
                Unmanaged<Reader>.fromOpaque(context).takeRetainedValue().run()
                return nil
            }, reader.toOpaque())
        guard status == 0 else {
            reader.release()
            return false
        }
        pthread_detach(thread)
        return true
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
