import DiskImage
import ImageStorage
import Synchronization

/// The body of one answer, for servers that send no ranges: its bytes are read once, in order.
///
/// Reads of neighbours may come in any order; the body waits for the one that comes next. Bytes
/// that no read wants for a while are passed over, and kept for a little: an image may have its
/// tables in front of its data.
final class HTTPStream: @unchecked Sendable {
    // The memory belongs to the stream until the read is resumed.
    private struct Read: @unchecked Sendable {
        var range: Range<Int64>
        var memory: UnsafeMutableRawBufferPointer
        var continuation: CheckedContinuation<Void, any Error>
    }

    private struct State: Sendable {
        /// Offset in bytes of the byte that comes next.
        var position: Int64 = 0
        /// Offset in bytes up to which bytes may be passed over.
        var mayPass: Int64 = 0
        var reads: [Read] = []
        /// The bytes up to `position`.
        var past: [UInt8] = []
        var failure: (any Error)?
        var isPaused = false
    }

    /// Number of bytes that are kept behind the position.
    private static let memory = 4 << 20
    /// Time in milliseconds for which the body waits for the read of its next byte, while others
    /// wait for later ones.
    private static let waiting = 200

    private let name: String
    private let state: Mutex<State>
    private let loop: HTTPLoop
    private let request: Mutex<HTTPRequest?> = Mutex(nil)

    /// - Parameter head: the bytes that have come already.
    init(name: String, head: [UInt8], loop: HTTPLoop) {
        self.name = name
        self.loop = loop
        state = Mutex(State(position: Int64(head.count), past: head))
    }

    /// Goes on with a request that has paused where `head` ends.
    func go(on request: HTTPRequest) {
        request.onEnd = { [self] outcome in
            guard let outcome else { return fail(CancellationError()) }
            guard outcome.code != 0 else { return }
            fail(error("the server sends no ranges, and \(outcome.failure)"))
        }
        self.request.withLock { $0 = request }
    }

    /// Ends the request.
    func close() { loop.close() }

    func read(_ range: Range<Int64>, into memory: UnsafeMutableRawBufferPointer) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await self.watch() }
            defer { group.cancelAll() }
            try await withTaskCancellationHandler {
                try await withCheckedThrowingContinuation { continuation in
                    add(Read(range: range, memory: memory, continuation: continuation))
                }
            } onCancel: {
                if let request = request.withLock({ $0 }) { loop.cancel(request) }
                fail(CancellationError())
            }
        }
    }

    private func add(_ read: Read) {
        state.withLock { state in
            if let failure = state.failure {
                read.continuation.resume(throwing: failure)
                return
            }
            let start = state.position - Int64(state.past.count)
            guard read.range.lowerBound >= start else {
                read.continuation.resume(throwing: tooLate())
                return
            }
            let index = state.reads.firstIndex { $0.range.lowerBound > read.range.lowerBound }
            state.reads.insert(read, at: index ?? state.reads.count)
            serve(&state, state.past[...], at: start)
        }
        goOn()
    }

    /// Lets bytes be passed over when the body has stood still for a while, until it is cancelled.
    private func watch() async throws {
        var position: Int64 = -1
        while true {
            try await Task.sleep(for: .milliseconds(Self.waiting))
            state.withLock { state in
                if state.position == position, let first = state.reads.first {
                    state.mayPass = max(state.mayPass, first.range.lowerBound)
                }
                position = state.position
            }
            goOn()
        }
    }

    /// Wakes the request if its next byte is wanted.
    private func goOn() {
        let isWanted = state.withLock { state in
            guard state.isPaused, Self.isWanted(state) else { return false }
            state.isPaused = false
            return true
        }
        if isWanted, let request = request.withLock({ $0 }) { loop.resume(request) }
    }

    private static func isWanted(_ state: State) -> Bool {
        state.position < state.mayPass
            || state.reads.contains { $0.range.contains(state.position) }
    }

    /// Takes the next bytes of the body.
    ///
    /// - Returns: false if no read wants them yet.
    func take(_ bytes: UnsafeRawBufferPointer) -> Bool {
        state.withLock { state in
            guard Self.isWanted(state) else {
                state.isPaused = true
                return false
            }
            let position = state.position
            state.position += Int64(bytes.count)
            state.past += bytes
            if state.past.count > 2 * Self.memory {
                state.past.removeFirst(state.past.count - Self.memory)
            }
            serve(&state, bytes, at: position)
            return true
        }
    }

    /// Copies bytes to the reads that want them, and resumes those that are complete.
    private func serve(_ state: inout State, _ bytes: some Collection<UInt8>, at offset: Int64) {
        let end = offset + Int64(bytes.count)
        for read in state.reads {
            let part = read.range.clamped(to: offset..<end)
            guard !part.isEmpty else { continue }
            let start = bytes.index(bytes.startIndex, offsetBy: Int(part.lowerBound - offset))
            let source = bytes[start..<bytes.index(start, offsetBy: part.count)]
            let place = Int(part.lowerBound - read.range.lowerBound)
            UnsafeMutableRawBufferPointer(rebasing: read.memory[place..<place + part.count])
                .copyBytes(from: source)
        }
        state.reads.removeAll { read in
            guard read.range.upperBound <= state.position else { return false }
            read.continuation.resume()
            return true
        }
    }

    private func fail(_ error: any Error) {
        state.withLock { state in
            if state.failure == nil { state.failure = error }
            for read in state.reads { read.continuation.resume(throwing: error) }
            state.reads = []
        }
    }

    private func tooLate() -> ImageError {
        error(
            "the server sends no ranges, and the image cannot be read in one pass: "
                + "download it first"
        )
    }

    private func error(_ reason: String) -> ImageError {
        ImageError(.unsupported, path: name, reason)
    }
}
