import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// The body of one answer, for servers that send no ranges.
///
/// The loop's thread copies the bytes to the memory of the reader that waits for them, and lets the
/// server wait while no reader does.
final class HTTPBody: ByteStream {
    // The memory belongs to the body until the reader is resumed.
    private struct Reader: @unchecked Sendable {
        var memory: UnsafeMutableRawBufferPointer
        var count = 0
        var continuation: CheckedContinuation<Int, any Error>
    }

    private struct State: Sendable {
        /// Bytes that came before the reader that wants them.
        var early: [UInt8]
        var reader: Reader?
        var isPaused = true
        var hasEnded = false
        var failure: (any Error)?
    }

    private let name: String
    private let loop: HTTPLoop
    private let state: Mutex<State>
    private let request = Mutex<HTTPRequest?>(nil)

    /// - Parameter head: the bytes that have come already.
    init(name: String, head: [UInt8], loop: HTTPLoop) {
        self.name = name
        self.loop = loop
        state = Mutex(State(early: head))
    }

    deinit { loop.close() }

    /// Goes on with a request that has paused where `head` ends.
    func go(on request: HTTPRequest) {
        // The body closes the loop, which ends the request.
        request.onEnd = { [weak self] in self?.end($0) }
        self.request.withLock { $0 = request }
    }

    func read(into buffer: inout MutableRawSpan) async throws -> Int {
        // The span is borrowed until this call returns, so the memory stays alive.
        let memory = buffer.withUnsafeMutableBytes { $0 }
        return try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                begin(Reader(memory: memory, continuation: continuation))
            }
        } onCancel: {
            fail(CancellationError())
            if let request = request.withLock({ $0 }) { loop.cancel(request) }
        }
    }

    /// The size of the disk is known, which tells more.
    var progress: StreamProgress? { nil }

    private func begin(_ reader: Reader) {
        let wasPaused = state.withLock { state in
            let early = state.early.prefix(reader.memory.count)
            state.early.removeFirst(early.count)
            state.reader = reader
            Self.add(early, to: &state)
            Self.resumeReader(&state)
            guard state.reader != nil, state.isPaused else { return false }
            state.isPaused = false
            return true
        }
        if wasPaused, let request = request.withLock({ $0 }) { loop.resume(request) }
    }

    /// Takes the next bytes of the body.
    ///
    /// - Returns: false if no reader wants them yet.
    func take(_ bytes: UnsafeRawBufferPointer) -> Bool {
        state.withLock { state in
            guard state.reader != nil else {
                state.isPaused = true
                return false
            }
            Self.add(bytes, to: &state)
            Self.resumeReader(&state)
            return true
        }
    }

    private static func add(_ bytes: some Collection<UInt8>, to state: inout State) {
        guard let reader = state.reader else { return }
        let fitting = bytes.prefix(reader.memory.count - reader.count)
        UnsafeMutableRawBufferPointer(rebasing: reader.memory[reader.count...])
            .copyBytes(from: fitting)
        state.reader?.count += fitting.count
        state.early += bytes.dropFirst(fitting.count)
    }

    /// Resumes the reader if it has all its bytes, or if no more will come.
    private static func resumeReader(_ state: inout State) {
        guard let reader = state.reader else { return }
        if reader.count == reader.memory.count || state.hasEnded {
            reader.continuation.resume(returning: reader.count)
        } else if let failure = state.failure {
            reader.continuation.resume(throwing: failure)
        } else {
            return
        }
        state.reader = nil
    }

    private func end(_ outcome: HTTPRequest.Outcome?) {
        guard let outcome else { return fail(CancellationError()) }
        guard outcome.code == 0 else {
            return fail(
                ImageError(
                    .system(errno: EIO), path: name,
                    "the server sends no ranges, and \(outcome.failure)"))
        }
        state.withLock { state in
            state.hasEnded = true
            Self.resumeReader(&state)
        }
    }

    private func fail(_ error: any Error) {
        state.withLock { state in
            if state.failure == nil { state.failure = error }
            Self.resumeReader(&state)
        }
    }
}
