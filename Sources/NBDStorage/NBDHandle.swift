import CNBD
import DiskImage
import Glibc
import ImageStorage

/// A connection through libnbd, used by one thread at a time.
final class NBDHandle {
    /// The properties of an export that the server announced when the connection began.
    struct Facts: Sendable, Equatable {
        var size: Int64
        var isReadOnly: Bool
        var canFlush: Bool
        var canZero: Bool
        /// Whether a request can ask for zeros only if that is faster than writing them.
        var canFastZero: Bool
        var canTrim: Bool
        /// Whether a write can ask to be answered only when it is on stable storage (FUA).
        var canWriteThrough: Bool
        var canMultiConn: Bool
        var canBlockStatus: Bool
        /// Unit in bytes of which offsets and lengths have to be multiples.
        var minimumBlock: Int64
        /// Unit in bytes at which the server is fastest; 1 if the server does not say.
        var preferredBlock: Int64
        /// Largest amount of data that one request may carry, in bytes.
        var maximumPayload: Int64
    }

    let facts: Facts
    /// Whether the server is on this machine: behind a unix socket, or at an address of our own.
    let isServerLocal: Bool
    private let handle: OpaquePointer
    /// Name of the export, for messages.
    private let name: String

    /// Time in seconds for a server to answer a new connection, unless the user gave another.
    private static let connectTimeout = 30

    /// Connects, and waits until the server has agreed on an export.
    ///
    /// - Parameters:
    ///   - timeout: in seconds; nil stands for `connectTimeout`.
    ///   - isGivenUp: asked now and then whether the connection is no longer wanted.
    init(
        _ address: NBDAddress, timeout: Int?, isGivenUp: () -> Bool
    ) throws(ImageError) {
        if let failure = Self.loadFailure {
            throw ImageError(.unsupported, "NBD needs the library libnbd: \(failure)")
        }
        guard let handle = cnbd_create() else { throw Self.lastError(address, "cannot connect") }
        do {
            try Self.connect(handle, address, timeout ?? Self.connectTimeout, isGivenUp)
        } catch {
            cnbd_close(handle)
            throw error
        }
        self.handle = handle
        name = address.name
        isServerLocal = cnbd_server_is_local(handle)
        facts = Facts(
            size: cnbd_size(handle), isReadOnly: cnbd_is_read_only(handle),
            canFlush: cnbd_can_flush(handle), canZero: cnbd_can_zero(handle),
            canFastZero: cnbd_can_fast_zero(handle), canTrim: cnbd_can_trim(handle),
            canWriteThrough: cnbd_can_fua(handle),
            canMultiConn: cnbd_can_multi_conn(handle),
            canBlockStatus: cnbd_can_block_status(handle),
            minimumBlock: max(1, cnbd_minimum_block(handle)),
            preferredBlock: max(1, cnbd_preferred_block(handle)),
            // The amount that every server accepts (NBD protocol, "Block size constraints").
            maximumPayload: cnbd_maximum_payload(handle) > 0
                ? cnbd_maximum_payload(handle) : 32 << 20)
        guard facts.size >= 0 else {
            throw Self.lastError(address, "cannot get the size of the export")
        }
    }

    deinit { cnbd_close(handle) }

    private static func connect(
        _ handle: OpaquePointer, _ address: NBDAddress, _ timeout: Int, _ isGivenUp: () -> Bool
    ) throws(ImageError) {
        let proof = try NBDServerProof(
            address, library: NBDLibraryVersion(text: String(cString: cnbd_version(handle))))
        guard !proof.isWaived || cnbd_waive_proof(handle) >= 0,
            proof.folder?.withCString({ cnbd_set_certificates(handle, $0) }) ?? 0 >= 0,
            cnbd_connect(handle, address.uri) >= 0
        else {
            throw lastError(address, "cannot connect")
        }
        let clock = ContinuousClock()
        let deadline = clock.now + .seconds(timeout)
        while !cnbd_is_ready(handle) {
            guard !cnbd_is_over(handle) else { throw lastError(address, "cannot connect") }
            guard !isGivenUp() else {
                throw ImageError(.system(errno: ECANCELED), path: address.name, "cannot connect")
            }
            guard clock.now < deadline else {
                throw ImageError(
                    .system(errno: ETIMEDOUT), path: address.name,
                    "cannot connect: no answer for \(timeout) seconds")
            }
            guard wait(handle, milliseconds: 100) else {
                throw lastError(address, "cannot connect")
            }
        }
    }

    /// The reason why libnbd could not be loaded, once per process; nil if it was loaded.
    private static let loadFailure: String? = {
        let failure = cnbd_load(
            { context, error in
                guard let context else { return }
                let request = Unmanaged<NBDRequest>.fromOpaque(context).takeUnretainedValue()
                request.result = error
                request.inbox?.finished.append(request)
            },
            { context, offset, pairs, count in
                guard let context, let pairs else { return }
                let request = Unmanaged<NBDRequest>.fromOpaque(context).takeUnretainedValue()
                var start = Int64(offset)
                for index in 0..<count / 2 {
                    // The last extent may reach beyond the requested range, and beyond the export.
                    let length = min(Int64(pairs[2 * index]), .max - start)
                    guard length > 0 else { continue }
                    // NBD_STATE_ZERO is bit 1. Bit 0, a hole, promises nothing about what is read.
                    request.extents.append(
                        Extent(
                            range: start..<start + length,
                            isHole: pairs[2 * index + 1] & 2 != 0))
                    start += length
                }
            },
            { context in
                guard let context else { return }
                Unmanaged<NBDRequest>.fromOpaque(context).release()
            })
        return failure.map { String(cString: $0) }
    }()

    private static func lastError(_ address: NBDAddress, _ what: String) -> ImageError {
        ImageError(.system(errno: cnbd_errno()), path: address.name, "\(what): \(lastReason)")
    }

    /// libnbd's message for the last call that failed in this thread.
    private static var lastReason: String {
        // The message begins with the name of libnbd's function.
        let reason = cnbd_error().map { String(cString: $0) } ?? "unknown error"
        guard reason.hasPrefix("nbd_"), let colon = reason.firstRange(of: ": ") else {
            return reason
        }
        return String(reason[colon.upperBound...])
    }

    /// Whether the connection has ended.
    var isOver: Bool { cnbd_is_over(handle) }

    /// The reason why a connection has ended.
    struct Loss {
        var error: ImageError
        /// Whether the server breaks the protocol, and would do so on a new connection.
        var isServersFault: Bool
    }

    /// The reason why the connection has ended; nil while it is open.
    private(set) var loss: Loss?

    /// Keeps libnbd's message for the end of the connection, which is lost with the thread's next
    /// call.
    private func noteEnd() {
        guard loss == nil, isOver else { return }
        let reason = Self.lastReason
        // libnbd sets the errno of a socket that failed, and none for a server that sent something
        // wrong or left something out.
        let isClosed = cnbd_is_closed(handle) || reason.contains("disconnect")
        let isServersFault = !isClosed && cnbd_errno() == 0
        let message =
            isClosed
            ? "the server closed the connection"
            : isServersFault
                ? "the server breaks the protocol: \(reason)" : "the connection was lost: \(reason)"
        loss = Loss(
            error: ImageError(
                .system(errno: isServersFault ? EPROTO : ECONNRESET), path: name, message),
            isServersFault: isServersFault)
    }

    /// The error for a request that libnbd did not take.
    func refusal(of request: NBDRequest) -> ImageError {
        let number = cnbd_errno()
        return ImageError(
            .system(errno: number == 0 ? EINVAL : number), path: name,
            "\(request.summary): \(Self.lastReason)")
    }

    /// Begins a request.
    ///
    /// - Returns: whether the request is in flight. Its result comes with this call or a later one.
    func begin(_ request: NBDRequest) -> Bool {
        let context = Unmanaged.passRetained(request).toOpaque()
        let durability = request.writesThrough ? cnbd_flag_fua : 0
        let offset = UInt64(request.offset)
        defer { noteEnd() }
        let cookie =
            switch request.operation {
            case .read(let memory):
                cnbd_read(handle, memory.baseAddress, memory.count, offset, context)
            case .write(let memory):
                cnbd_write(
                    handle, memory.baseAddress, memory.count, offset, durability, context)
            case .zero(let count, let manner):
                cnbd_zero(handle, UInt64(count), offset, manner.flags | durability, context)
            case .trim(let count):
                cnbd_trim(handle, UInt64(count), offset, durability, context)
            case .flush: cnbd_flush(handle, context)
            case .blockStatus(let count):
                cnbd_block_status(handle, UInt64(count), offset, context)
            }
        return cookie >= 0
    }

    /// Whether part of a request did not fit into the socket.
    var wantsToWrite: Bool { cnbd_direction(handle) & cnbd_direction_write != 0 }

    /// The events of `poll` that libnbd waits for.
    private static func wantedEvents(_ handle: OpaquePointer) -> Int16 {
        let direction = cnbd_direction(handle)
        return (direction & cnbd_direction_read != 0 ? Int16(POLLIN) : 0)
            | (direction & cnbd_direction_write != 0 ? Int16(POLLOUT) : 0)
    }

    /// The descriptor and events to poll for.
    var wish: pollfd {
        pollfd(fd: cnbd_descriptor(handle), events: Self.wantedEvents(handle), revents: 0)
    }

    /// The value of `wish` if there is nothing to poll for.
    static let noWish = pollfd(fd: -1, events: 0, revents: 0)

    /// Handles the events that `poll` found, as far as libnbd still waits for them.
    func notify(_ happened: Int16) {
        _ = Self.notify(handle, happened)
        noteEnd()
    }

    private static func notify(_ handle: OpaquePointer, _ happened: Int16) -> Bool {
        let wanted = wantedEvents(handle)
        let isBroken = happened & Int16(POLLHUP | POLLERR) != 0
        if wanted & Int16(POLLIN) != 0, isBroken || happened & Int16(POLLIN) != 0 {
            return cnbd_notify_read(handle) >= 0
        }
        if wanted & Int16(POLLOUT) != 0, isBroken || happened & Int16(POLLOUT) != 0 {
            return cnbd_notify_write(handle) >= 0
        }
        return true
    }

    private static func wait(_ handle: OpaquePointer, milliseconds: Int32) -> Bool {
        var polled = pollfd(fd: cnbd_descriptor(handle), events: wantedEvents(handle), revents: 0)
        guard Glibc.poll(&polled, 1, milliseconds) > 0 else { return true }
        return notify(handle, polled.revents)
    }

    /// Says goodbye, and waits up to a second for that to be sent.
    func disconnect() {
        guard !isOver, cnbd_disconnect(handle) >= 0 else { return }
        for _ in 0..<10 where !isOver { _ = Self.wait(handle, milliseconds: 100) }
    }
}

extension NBDRequest.ZeroManner {
    fileprivate var flags: UInt32 {
        switch self {
        case .asServerLikes: 0
        case .onlyFast: cnbd_flag_fast_zero
        case .allocated: cnbd_flag_no_hole
        }
    }
}
