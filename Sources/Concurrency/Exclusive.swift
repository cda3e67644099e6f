import Synchronization

/// A value that callers change one at a time, in the order in which they come, also while they wait
/// for I/O.
package final class Exclusive<Value: ~Copyable & Sendable>: Sendable {
    private let gate = SerialGate()
    /// nil while a caller has the value.
    private let value: Mutex<Value?>

    package init(_ value: consuming sending Value) { self.value = Mutex(value) }

    package func use<Result: Sendable>(
        _ body: (inout Value) async throws -> Result
    ) async throws -> Result {
        await gate.enter()
        defer { gate.leave() }
        guard var taken = value.withLock({ $0.take() }) else {
            preconditionFailure("the gate lets one caller in")
        }
        do {
            let result = try await body(&taken)
            giveBack(taken)
            return result
        } catch {
            giveBack(taken)
            throw error
        }
    }

    private func giveBack(_ taken: consuming Value) {
        var taken: Value? = taken
        value.withLock { $0 = taken.take() }
    }
}
