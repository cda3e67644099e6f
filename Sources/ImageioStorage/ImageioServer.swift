import DiskImage
import FoundationEssentials
import Glibc
import HTTPStorage
import ImageStorage
import Synchronization

/// The connections to a daemon. Each carries one request at a time; the daemon opens the disk for
/// each of them anew.
final class ImageioServer: Sendable {
    /// The daemon's answer to OPTIONS.
    struct Features: Decodable {
        var features: [String]?
        var maxReaders: Int?
        var maxWriters: Int?
        var unixSocket: String?

        private enum CodingKeys: String, CodingKey {
            case features
            case maxReaders = "max_readers"
            case maxWriters = "max_writers"
            case unixSocket = "unix_socket"
        }
    }

    /// A part of the disk, as the daemon describes it.
    struct Part: Decodable {
        var start: Int64
        var length: Int64
        var zero: Bool
        var hole: Bool?
    }

    /// The daemon's answer to the request of a checksum.
    private struct Checksum: Decodable { var checksum: String }

    let address: ImageioAddress
    private let url: String
    private let settings: HTTPSettings
    /// The settings of requests that may take long.
    private let patientSettings: HTTPSettings
    private let loops: [HTTPLoop]
    private let retries: Int
    /// For each connection: number of requests on their way, and whether it has written something
    /// since its last flush.
    private let states: Mutex<[(load: Int, hasWritten: Bool)]>

    private init(
        _ address: ImageioAddress, url: String, _ options: HTTPOptions, loops: [HTTPLoop]
    ) {
        self.address = address
        self.url = url
        self.loops = loops
        retries = options.retries
        (settings, patientSettings) = Self.settings(options)
        states = Mutex(loops.map { _ in (0, false) })
    }

    deinit { for loop in loops { loop.close() } }

    /// Answers of a server or of a proxy before it that may pass. A daemon's 500 is an error of the
    /// disk.
    private static let busy = [502, 503, 504]
    /// Beginning of the error messages before the disk is open.
    private static let opening = "cannot open"

    /// Number of connections.
    var connections: Int { loops.count }

    private static func settings(_ options: HTTPOptions) -> (HTTPSettings, HTTPSettings) {
        var patient = options
        patient.timeout = 0
        return (HTTPSettings(options), HTTPSettings(patient))
    }

    /// Connects, and asks what the daemon can do and where the disk has data.
    ///
    /// - Returns: also the parts of the disk. An old daemon, which does not tell them, has one
    ///   part, of data.
    /// - Throws: `ImageError`.
    static func open(
        _ address: ImageioAddress, _ options: HTTPOptions, forWriting: Bool
    ) throws(ImageError) -> (ImageioServer, Features, [Part]) {
        var options = options
        options.socket = address.socket
        let first = try HTTPLoop(most: 1)
        let once = ImageioServer(address, url: address.url, options, loops: [first])
        let (greeting, isLocal) = try once.ask(HTTPCommand("OPTIONS"))
        var url = address.url
        var features = Features()
        if greeting.status == 200 {
            features = try once.decode(Features.self, greeting.body, Self.opening)
        } else if greeting.status != 405, greeting.status != 204 {
            throw once.refusal(Self.opening, greeting.status, greeting.reason, greeting.body)
        }
        if forWriting, let known = features.features, !known.contains("flush") {
            throw once.failure(Self.opening, "the ticket allows only reading")
        }
        if isLocal, options.socket == nil, let socket = features.unixSocket {
            // The way through the socket is shorter, and needs no encryption.
            var local = options
            local.socket = HostPath(socket)
            let path = url.drop { $0 != "/" }.dropFirst(2).drop { $0 != "/" }
            let near = ImageioServer(
                address, url: "http://localhost" + path, local, loops: [try HTTPLoop(most: 1)])
            if let (answer, _) = try? near.ask(HTTPCommand("OPTIONS")), answer.status == 200 {
                (options, url) = (local, near.url)
            }
        }
        let most = forWriting ? features.maxWriters : features.maxReaders
        let count = max(1, min(options.connections ?? 1, most ?? 1))
        var loops: [HTTPLoop] = []
        for _ in 0..<count { loops.append(try HTTPLoop(most: 1)) }
        let server = ImageioServer(address, url: url, options, loops: loops)
        let parts = try server.parts(isOld: features.features?.contains("extents") != true)
        for loop in loops { try loop.start() }
        return (server, features, parts)
    }

    private func parts(isOld: Bool) throws(ImageError) -> [Part] {
        let (answer, _) =
            isOld ? try ask(HTTPCommand(range: 0..<1)) : try ask(HTTPCommand(), "/extents")
        if isOld, answer.status == 206, let size = answer.total {
            return [Part(start: 0, length: size, zero: false)]
        }
        guard !isOld, answer.status == 200 else {
            throw refusal(Self.opening, answer.status, answer.reason, answer.body)
        }
        return try decode([Part].self, answer.body, Self.opening)
    }

    /// Sends a request before the threads run.
    private func ask(
        _ command: HTTPCommand, _ suffix: String = ""
    ) throws(ImageError) -> (ImageioSink.Answer, isLocal: Bool) {
        let sink = ImageioSink()
        let request = try HTTPRequest(
            patientSettings, address: url + suffix, command, into: sink)
        var outcome: HTTPRequest.Outcome?
        var isOver = false
        request.onEnd = {
            outcome = $0
            isOver = true
        }
        loops[0].submit(request)
        loops[0].run { isOver || Task.isCancelled }
        guard let outcome, outcome.code == 0 else {
            throw failure(Self.opening, outcome?.failure ?? "interrupted")
        }
        return (sink.answer(outcome), outcome.isLocal)
    }

    private func decode<Value: Decodable>(
        _ type: Value.Type, _ body: [UInt8], _ what: String
    ) throws(ImageError) -> Value {
        do {
            return try JSONDecoder().decode(type, from: Data(body))
        } catch {
            throw failure(what, "the server's answer makes no sense")
        }
    }

    /// Reads a range, which is within the disk.
    func read(
        _ range: Range<Int64>, into memory: UnsafeMutableRawBufferPointer
    ) async throws -> HTTPRequest.Outcome {
        let sink = ImageioSink(memory)
        let what = "cannot read \(range.count) bytes at offset \(range.lowerBound)"
        let outcome = try await send(HTTPCommand(range: range), into: sink, what)
        guard outcome.answer.status == 206, sink.count == memory.count else {
            throw failure(what, "the server sends \(sink.count) bytes")
        }
        return outcome
    }

    /// - Parameter flushes: whether the daemon flushes before it answers.
    func write(
        _ bytes: UnsafeRawBufferPointer, at offset: Int64, flushes: Bool
    ) async throws -> HTTPRequest.Outcome {
        let end = offset + Int64(bytes.count)
        return try await send(
            HTTPCommand(
                "PUT",
                headers: [
                    "Content-Range: bytes \(offset)-\(end - 1)/*",
                    "Content-Type: application/octet-stream",
                ], body: bytes), flushes ? "" : "?flush=n", changes: true,
            "cannot write \(bytes.count) bytes at offset \(offset)")
    }

    func zero(_ range: Range<Int64>) async throws {
        let words =
            #"{"op":"zero","offset":\#(range.lowerBound),"size":\#(range.count),"flush":false}"#
        try await patch(
            words, changes: true, "cannot zero \(range.count) bytes at offset \(range.lowerBound)")
    }

    /// Flushes on each connection that has written, because each has opened the disk for itself.
    func flush() async throws {
        let numbers = states.withLock { states in
            let numbers = states.indices.filter { states[$0].hasWritten }
            for number in numbers { states[number].hasWritten = false }
            return numbers
        }
        do {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for number in numbers {
                    group.addTask {
                        try await self.patch(#"{"op":"flush"}"#, on: number, "cannot flush")
                    }
                }
                try await group.waitForAll()
            }
        } catch {
            states.withLock { states in
                for number in numbers { states[number].hasWritten = true }
            }
            throw error
        }
    }

    /// The checksum of the disk: the SHA-256 of the SHA-256s of its blocks, as digits. The daemon
    /// reads all of the disk before it answers.
    func checksum(blockSize: Int64) async throws -> String {
        let what = "cannot compute the checksum"
        let sink = ImageioSink()
        let outcome = try await send(
            HTTPCommand(), "/checksum?algorithm=sha256&block_size=\(blockSize)", into: sink,
            isPatient: true, what)
        return try decode(Checksum.self, sink.answer(outcome).body, what).checksum
    }

    private func patch(
        _ words: String, on number: Int? = nil, changes: Bool = false, _ what: String
    ) async throws {
        let body = UnsafeMutableRawBufferPointer.allocate(
            byteCount: words.utf8.count, alignment: 1)
        defer { body.deallocate() }
        body.copyBytes(from: words.utf8)
        _ = try await send(
            HTTPCommand(
                "PATCH", headers: ["Content-Type: application/json"],
                body: UnsafeRawBufferPointer(body)), on: number, isPatient: true, changes: changes,
            what)
    }

    /// Sends a request, and returns when it is answered well.
    ///
    /// A request that only reads is repeated after a failure that may pass, on a connection that
    /// has nothing to flush. One that writes is not: the daemon does not notice that a client has
    /// gone, goes on with the first attempt, and would overwrite what is written later.
    ///
    /// - Parameters:
    ///   - number: number of the connection; nil takes the one that has least to do.
    ///   - changes: whether the request changes the disk.
    ///   - what: beginning of the error message.
    private func send(
        _ command: HTTPCommand, _ suffix: String = "", on number: Int? = nil,
        into sink: ImageioSink = ImageioSink(), isPatient: Bool = false, changes: Bool = false,
        _ what: String
    ) async throws -> HTTPRequest.Outcome {
        var patience = HTTPPatience(retries: command.method == "GET" ? retries : 0)
        while true {
            let (outcome, number) = try await attempt(
                command, suffix, on: number, into: sink, isPatient: isPatient, changes: changes)
            let answer = sink.answer(outcome)
            if outcome.code == 0, (200..<300).contains(answer.status) { return outcome }
            if outcome.isPassing || Self.busy.contains(answer.status),
                !states.withLock({ $0[number].hasWritten }),
                let wait = patience.nextWait(asked: outcome.answer.retryAfter)
            {
                try await Task.sleep(for: .milliseconds(wait))
                continue
            }
            guard outcome.code == 0 else {
                if changes, let reason = try await closedTicket(what) { throw reason }
                throw failure(what, outcome.failure, errno: ECONNABORTED)
            }
            throw refusal(what, answer.status, answer.reason, answer.body)
        }
    }

    /// The reason why no request is taken any more, if the ticket has expired or was taken back.
    /// The answer to a write says so, too, but the daemon closes the connection over a body that it
    /// has not read, and the answer can be lost with it.
    private func closedTicket(_ what: String) async throws -> ImageError? {
        let sink = ImageioSink()
        let (outcome, _) = try await attempt(
            HTTPCommand("OPTIONS"), "", on: nil, into: sink, isPatient: false, changes: false)
        let answer = sink.answer(outcome)
        guard outcome.code == 0, answer.status == 403 else { return nil }
        return refusal(what, answer.status, answer.reason, answer.body)
    }

    private func attempt(
        _ command: HTTPCommand, _ suffix: String, on number: Int?, into sink: ImageioSink,
        isPatient: Bool, changes: Bool
    ) async throws -> (HTTPRequest.Outcome, number: Int) {
        let number = states.withLock { states in
            let chosen =
                number ?? states.indices.min { states[$0].load < states[$1].load } ?? 0
            states[chosen].load += 1
            if changes { states[chosen].hasWritten = true }
            return chosen
        }
        defer { states.withLock { $0[number].load -= 1 } }
        let request = try HTTPRequest(
            isPatient ? patientSettings : settings, address: url + suffix, command, into: sink)
        return (try await loops[number].perform(request), number)
    }

    private func failure(_ what: String, _ reason: String, errno: Int32 = EIO) -> ImageError {
        ImageError(
            .system(errno: errno), path: address.label, "\(what): \(address.redacted(reason))")
    }

    private func refusal(
        _ what: String, _ status: Int, _ reason: String, _ body: [UInt8]
    ) -> ImageError {
        let words = [reason, body.prefix(200).text.trimmed].filter { !$0.isEmpty }
        // A daemon that is well otherwise refuses what it cannot read with a status such as 500.
        return failure(
            what, "the server answers \(status) \(words.joined(separator: ": "))",
            errno: status >= 500 ? EIO : ECONNABORTED)
    }
}

/// Takes the body of an answer: bytes of the disk, or text.
private final class ImageioSink: HTTPSink {
    struct Answer {
        var status: Int
        var reason: String
        /// Size of the disk in bytes, if the answer is a part of it.
        var total: Int64?
        var body: [UInt8]
    }

    /// Longest text in bytes: enough for the parts of a disk of some millions.
    private static let longestText = 256 << 20

    private let memory: UnsafeMutableRawBufferPointer?
    private(set) var count = 0
    private var text: [UInt8] = []
    private var isData = false

    init(_ memory: UnsafeMutableRawBufferPointer? = nil) { self.memory = memory }

    func answer(_ outcome: HTTPRequest.Outcome) -> Answer {
        Answer(
            status: outcome.answer.status, reason: outcome.answer.reason,
            total: outcome.answer.total, body: text)
    }

    func accept(_ answer: HTTPAnswer) -> Bool {
        isData = memory != nil && answer.status == 206
        // An earlier attempt may have left something.
        (count, text) = (0, [])
        return true
    }

    func take(_ bytes: UnsafeRawBufferPointer) -> Bool {
        guard let memory, isData else {
            if text.count < Self.longestText { text += bytes }
            return true
        }
        let taken = min(bytes.count, memory.count - count)
        UnsafeMutableRawBufferPointer(rebasing: memory[count..<count + taken])
            .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[..<taken]))
        count += bytes.count
        return true
    }
}
