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

    private let handle: OpaquePointer
    /// Name of the export, for messages.
    private let name: String

    /// Time in seconds for a server to answer a new connection, unless the user gave another.
    private static let connectTimeout = 30
    /// The metadata context that says what is a hole and what reads as zeros.
    private static let allocation = "base:allocation"
    /// The only context that is asked for.
    private let context: String

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
        name = address.name
        context = address.context ?? Self.allocation
        guard let handle = nbd.create() else { throw Self.lastError(name, "cannot connect") }
        self.handle = handle
        try connect(to: address, timeout ?? Self.connectTimeout, isGivenUp)
        guard nbd.get_size(handle) >= 0 else {
            throw Self.lastError(name, "cannot get the size of the export")
        }
        guard address.context == nil || nbd.can_meta_context(handle, context) > 0 else {
            throw ImageError(
                .invalid, path: name, "requested x-dirty-bitmap \(context) not found")
        }
    }

    deinit { nbd.close(handle) }

    private func connect(
        to address: NBDAddress, _ timeout: Int, _ isGivenUp: () -> Bool
    ) throws(ImageError) {
        let version = nbd.get_version(handle).map { String(cString: $0) } ?? ""
        let proof = try NBDServerProof(address, library: NBDLibraryVersion(text: version))
        // Buffers are not cleared before a read fills them, and the URI names TLS files. That any
        // certificate will do, older libraries do not take from the URI.
        guard nbd.add_meta_context(handle, context) >= 0,
            nbd.set_pread_initialize(handle, false) >= 0,
            nbd.set_uri_allow_local_file(handle, true) >= 0,
            !proof.isWaived || nbd.set_tls_verify_peer(handle, false) >= 0,
            proof.folder?.withCString({ nbd.set_tls_certificates(handle, $0) }) ?? 0 >= 0,
            nbd.aio_connect_uri(handle, address.uri) >= 0
        else {
            throw Self.lastError(name, "cannot connect")
        }
        let deadline = ContinuousClock.now + .seconds(timeout)
        while nbd.aio_is_ready(handle) <= 0 {
            guard !isOver else { throw Self.lastError(name, "cannot connect") }
            guard !isGivenUp() else {
                throw ImageError(.system(errno: ECANCELED), path: name, "cannot connect")
            }
            guard ContinuousClock.now < deadline else {
                throw ImageError(
                    .system(errno: ETIMEDOUT), path: name,
                    "cannot connect: no answer for \(timeout) seconds")
            }
            guard wait(milliseconds: 100) else { throw Self.lastError(name, "cannot connect") }
        }
    }

    /// The properties that the server announced. Ask only before anything else is done with the
    /// connection.
    var facts: Facts {
        let payload = nbd.get_block_size(handle, LIBNBD_SIZE_MAXIMUM)
        return Facts(
            size: nbd.get_size(handle), isReadOnly: nbd.is_read_only(handle) > 0,
            canFlush: nbd.can_flush(handle) > 0, canZero: nbd.can_zero(handle) > 0,
            canFastZero: nbd.can_fast_zero(handle) > 0, canTrim: nbd.can_trim(handle) > 0,
            canWriteThrough: nbd.can_fua(handle) > 0,
            canMultiConn: nbd.can_multi_conn(handle) > 0,
            canBlockStatus: nbd.can_meta_context(handle, context) > 0,
            minimumBlock: max(1, nbd.get_block_size(handle, LIBNBD_SIZE_MINIMUM)),
            preferredBlock: max(1, nbd.get_block_size(handle, LIBNBD_SIZE_PREFERRED)),
            // The amount that every server accepts (NBD protocol, "Block size constraints").
            maximumPayload: payload > 0 ? payload : 32 << 20)
    }

    /// Whether the server is on this machine: behind a unix socket, or at an address of our own.
    var isServerLocal: Bool { cnbd_is_local(nbd.aio_get_fd(handle)) }

    /// The reason why libnbd could not be loaded, once per process; nil if it was loaded.
    private static let loadFailure = cnbd_load().map { String(cString: $0) }

    private static func lastError(_ name: String, _ what: String) -> ImageError {
        ImageError(.system(errno: nbd.get_errno()), path: name, "\(what): \(lastReason)")
    }

    /// libnbd's message for the last call that failed in this thread.
    private static var lastReason: String {
        // The message begins with the name of libnbd's function.
        let reason = nbd.get_error().map { String(cString: $0) } ?? "unknown error"
        guard reason.hasPrefix("nbd_"), let colon = reason.firstRange(of: ": ") else {
            return reason
        }
        return String(reason[colon.upperBound...])
    }

    /// Whether the connection has ended, by either side or by an error.
    var isOver: Bool { nbd.aio_is_dead(handle) != 0 || nbd.aio_is_closed(handle) != 0 }

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
        let isClosed = nbd.aio_is_closed(handle) > 0 || reason.contains("disconnect")
        let isServersFault = !isClosed && nbd.get_errno() == 0
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
        let number = nbd.get_errno()
        return ImageError(
            .system(errno: number == 0 ? EINVAL : number), path: name,
            "\(request.summary): \(Self.lastReason)")
    }

    /// Begins a request.
    ///
    /// - Returns: whether the request is in flight. Its result comes with this call or a later one.
    func begin(_ request: NBDRequest) -> Bool {
        let completion = Self.completion(of: request)
        let durability = request.writesThrough ? LIBNBD_CMD_FLAG_FUA : 0
        let offset = UInt64(request.offset)
        defer { noteEnd() }
        let cookie =
            switch request.operation {
            case .read(let memory):
                nbd.aio_pread(handle, memory.baseAddress, memory.count, offset, completion, 0)
            case .write(let memory):
                nbd.aio_pwrite(
                    handle, memory.baseAddress, memory.count, offset, completion, durability)
            case .zero(let count, let manner):
                nbd.aio_zero(
                    handle, UInt64(count), offset, completion, manner.flags | durability)
            case .trim(let count):
                nbd.aio_trim(handle, UInt64(count), offset, completion, durability)
            case .flush: nbd.aio_flush(handle, completion, 0)
            case .blockStatus(let count):
                nbd.aio_block_status(
                    handle, UInt64(count), offset, Self.extents(of: request), completion, 0)
            }
        return cookie >= 0
    }

    /// Puts a request that has ended into its inbox. Holds the request until libnbd is done with
    /// it.
    private static func completion(of request: NBDRequest) -> nbd_completion_callback {
        nbd_completion_callback(
            callback: { context, error in
                if let context, let error {
                    let request = Unmanaged<NBDRequest>.fromOpaque(context).takeUnretainedValue()
                    request.result = error.pointee
                    request.inbox?.finished.append(request)
                }
                // Retires the request: no call will ask for its result.
                return 1
            },
            user_data: Unmanaged.passRetained(request).toOpaque(),
            free: { context in
                if let context { Unmanaged<NBDRequest>.fromOpaque(context).release() }
            })
    }

    /// Adds the extents of an answer about block status, pairs of length and flags, to a request
    /// that `completion` holds.
    private static func extents(of request: NBDRequest) -> nbd_extent_callback {
        nbd_extent_callback(
            callback: { context, kind, offset, pairs, count, _ in
                guard let context, let kind, let pairs else { return 0 }
                let kindName = String(cString: kind)
                let request = Unmanaged<NBDRequest>.fromOpaque(context).takeUnretainedValue()
                var start = Int64(offset)
                for index in 0..<count / 2 {
                    // The last extent may reach beyond the requested range, and beyond the export.
                    let length = min(Int64(pairs[2 * index]), .max - start)
                    guard length > 0 else { continue }
                    request.extents.append(
                        NBDHandle.extent(
                            start..<start + length, flags: pairs[2 * index + 1], kindName))
                    start += length
                }
                return 0
            },
            user_data: Unmanaged.passUnretained(request).toOpaque(), free: nil)
    }

    /// The extent that a server's flags mean.
    private static func extent(_ range: Range<Int64>, flags: UInt32, _ context: String) -> Extent {
        // NBD_STATE_ZERO is bit 1. Bit 0, a hole, promises nothing about what is read.
        guard context != allocation else { return Extent(range: range, isHole: flags & 2 != 0) }
        var extent = Extent(range: range, isHole: false)
        // Shown as if it were the usual context, as qemu does: in that of a dirty bitmap, bit 0
        // marks what is dirty. In that of the depth, all depths from 2 on are shown as 2.
        let shown = context == "qemu:allocation-depth" ? min(flags, 2) : flags & 3
        extent.shown =
            switch shown {
            case 0: .data
            case 1: .marked
            case 2: .preallocated
            default: .hole
            }
        return extent
    }

    /// Whether part of a request did not fit into the socket.
    var wantsToWrite: Bool { wantedEvents & Int16(POLLOUT) != 0 }

    /// The events of `poll` that libnbd waits for.
    private var wantedEvents: Int16 {
        let direction = Int32(nbd.aio_get_direction(handle))
        return (direction & LIBNBD_AIO_DIRECTION_READ != 0 ? Int16(POLLIN) : 0)
            | (direction & LIBNBD_AIO_DIRECTION_WRITE != 0 ? Int16(POLLOUT) : 0)
    }

    /// The descriptor and events to poll for.
    var wish: pollfd { pollfd(fd: nbd.aio_get_fd(handle), events: wantedEvents, revents: 0) }

    /// The value of `wish` if there is nothing to poll for.
    static let noWish = pollfd(fd: -1, events: 0, revents: 0)

    /// Handles the events that `poll` found, as far as libnbd still waits for them.
    func notify(_ happened: Int16) {
        _ = react(to: happened)
        noteEnd()
    }

    private func react(to happened: Int16) -> Bool {
        let wanted = wantedEvents
        let isBroken = happened & Int16(POLLHUP | POLLERR) != 0
        if wanted & Int16(POLLIN) != 0, isBroken || happened & Int16(POLLIN) != 0 {
            return nbd.aio_notify_read(handle) >= 0
        }
        if wanted & Int16(POLLOUT) != 0, isBroken || happened & Int16(POLLOUT) != 0 {
            return nbd.aio_notify_write(handle) >= 0
        }
        return true
    }

    private func wait(milliseconds: Int32) -> Bool {
        var polled = wish
        guard Glibc.poll(&polled, 1, milliseconds) > 0 else { return true }
        return react(to: polled.revents)
    }

    /// Says goodbye, and waits up to a second for that to be sent.
    func disconnect() {
        guard !isOver, nbd.aio_disconnect(handle, 0) >= 0 else { return }
        for _ in 0..<10 where !isOver { _ = wait(milliseconds: 100) }
    }
}

extension NBDRequest.ZeroManner {
    fileprivate var flags: UInt32 {
        switch self {
        case .asServerLikes: 0
        case .onlyFast: LIBNBD_CMD_FLAG_FAST_ZERO
        case .allocated: LIBNBD_CMD_FLAG_NO_HOLE
        }
    }
}

/// libnbd's functions. Valid once `NBDHandle.loadFailure` is known to be nil.
private var nbd: cnbd_library { cnbd_loaded().pointee }
