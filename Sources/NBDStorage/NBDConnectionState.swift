import DiskImage

/// The state of a connection to a server.
///
///     unopened ── needed ──▶ connecting ── connected ──▶ open ── close ──▶ draining
///                              │    ▲                     │                  │ idle
///                  out of time │    │ needed,             │ broken           ▼
///                              ▼    │ may reconnect       ▼                closing
///                            failed └─────────────────── lost                │ gone
///                              ▲        needed, may not   │                  ▼
///                              └──────────────────────────┘                ended
///
/// Pure: it is told what happened, and answers with what has to be done. A connection whose goodbye
/// is being sent is never made anew, whatever happens then.
struct NBDConnectionState {
    enum Phase: Equatable {
        /// No request has needed the connection yet.
        case unopened
        /// Requests are sent and answered.
        case open
        /// No more requests will come; the last ones are not answered yet.
        case draining
        /// The goodbye (NBD_CMD_DISC) is being sent.
        case closing
        /// The server is gone, for this reason, and no request has needed it since.
        case lost(ImageError)
        /// The connection is being made, or made anew, for the waiting requests.
        case connecting
        /// Every request ends with this error.
        case failed(ImageError)
        /// Nothing more will happen.
        case ended
    }

    /// The work that an event causes for the holder of the connection.
    enum Action: Equatable {
        case nothing
        /// Send the waiting requests.
        case send
        /// Connect after a pause in milliseconds, and report `connected` or `refused`.
        case connect(after: Int)
        /// Answer all requests with this error.
        case fail(ImageError)
        /// Answer all requests as cancelled.
        case cancel
        /// Say goodbye, and report `gone`.
        case sayGoodbye
    }

    private(set) var phase: Phase
    /// Whether the connection has been open at some time.
    private(set) var wasOpen: Bool
    /// Whether no more requests will come.
    private(set) var isClosed = false
    /// Time in seconds that a lost connection may stay away; nil never makes it anew.
    private let reconnectTime: Int?
    /// Time of the first loss since the last answer.
    private var lostSince: ContinuousClock.Instant?
    /// Number of attempts since `lostSince`.
    private var vainAttempts = 0

    /// Longest pause between two attempts, in milliseconds.
    private static let longestPause = 1000

    init(isOpen: Bool, reconnectTime: Int?) {
        phase = isOpen ? .open : .unopened
        wasOpen = isOpen
        self.reconnectTime = reconnectTime
    }

    /// Notes that requests wait to be sent.
    mutating func needed(at now: ContinuousClock.Instant) -> Action {
        switch phase {
        case .open, .draining: return .send
        case .connecting: return .nothing
        case .unopened:
            phase = .connecting
            return .connect(after: 0)
        case .lost(let cause): return reconnect(cause, at: now)
        case .failed(let error): return .fail(error)
        case .closing, .ended: return .cancel
        }
    }

    /// Notes that the server is gone.
    ///
    /// - Parameters:
    ///   - isBusy: whether requests have not been answered.
    ///   - isFinal: whether connecting again is useless, because the server breaks the protocol.
    mutating func broken(
        _ cause: ImageError, isBusy: Bool, isFinal: Bool = false, at now: ContinuousClock.Instant
    ) -> Action {
        switch phase {
        case .closing:
            phase = .ended
            return .nothing
        case .open, .draining:
            if isFinal { return fail(cause) }
            if isBusy { return reconnect(cause, at: now) }
            phase = isClosed ? .ended : .lost(cause)
            return .nothing
        case .unopened, .lost, .connecting, .failed, .ended: return .nothing
        }
    }

    /// Notes that a request was answered, so that the next loss is a new one.
    mutating func answered() {
        lostSince = nil
        vainAttempts = 0
    }

    /// Notes that the connection is open.
    mutating func connected() -> Action {
        guard phase == .connecting else { return .nothing }
        phase = isClosed ? .draining : .open
        wasOpen = true
        return .send
    }

    /// Notes that an attempt to connect failed.
    ///
    /// - Parameter isFinal: whether another attempt is useless, because the export has changed.
    mutating func refused(
        _ cause: ImageError, isFinal: Bool = false, at now: ContinuousClock.Instant
    ) -> Action {
        guard phase == .connecting else { return .nothing }
        return isFinal ? fail(cause) : reconnect(cause, at: now)
    }

    /// Notes that no more requests will come.
    mutating func close(isIdle: Bool) -> Action {
        isClosed = true
        switch phase {
        case .open where isIdle, .draining where isIdle:
            phase = .closing
            return .sayGoodbye
        case .open: phase = .draining
        case .unopened, .lost, .failed: phase = .ended
        case .draining, .connecting, .closing, .ended: break
        }
        return .nothing
    }

    /// Notes that the goodbye has been sent.
    mutating func gone() { if phase == .closing { phase = .ended } }

    /// Ends the connection, because the caller gives up all that is in flight.
    mutating func abort() -> Action {
        phase = .ended
        return .cancel
    }

    /// Notes that the server did not answer in time.
    mutating func timedOut(_ error: ImageError) -> Action {
        switch phase {
        case .open, .draining: return fail(error)
        default: return .nothing
        }
    }

    private mutating func reconnect(
        _ cause: ImageError, at now: ContinuousClock.Instant
    ) -> Action {
        let since = lostSince ?? now
        lostSince = since
        guard let reconnectTime, now - since < .seconds(reconnectTime) else { return fail(cause) }
        let pause = vainAttempts == 0 ? 0 : min(Self.longestPause, 50 << min(vainAttempts, 10))
        vainAttempts += 1
        phase = .connecting
        return .connect(after: pause)
    }

    private mutating func fail(_ error: ImageError) -> Action {
        phase = .failed(error)
        return .fail(error)
    }
}
