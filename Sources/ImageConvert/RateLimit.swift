import Synchronization

/// Keeps a conversion to a number of bytes per second (`-r`).
final class RateLimit: Sendable {
    private let pace: Mutex<Pace>
    private let start = ContinuousClock.now

    init(bytesPerSecond: Int64) { pace = Mutex(Pace(bytesPerSecond: bytesPerSecond)) }

    /// Waits until so many more bytes may be copied.
    func pass(_ bytes: Int64) async throws {
        let now = ContinuousClock.now - start
        let turn = pace.withLock { $0.turn(for: bytes, at: now) }
        if turn > now { try await Task.sleep(for: turn - now) }
    }
}

/// The times at which pieces may pass. Pure.
struct Pace {
    private let bytesPerSecond: Int64
    /// When the pieces so far will have passed.
    private var end = Duration.zero

    init(bytesPerSecond: Int64) { self.bytesPerSecond = max(1, bytesPerSecond) }

    /// The time at which a piece may pass. Time in which nothing passed is not made up for.
    mutating func turn(for bytes: Int64, at now: Duration) -> Duration {
        let turn = max(now, end)
        end = turn + .seconds(1) * (Double(bytes) / Double(bytesPerSecond))
        return turn
    }
}
