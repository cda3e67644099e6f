import Synchronization

/// The progress of all workers together; it never goes back.
package final class ProgressMark: Sendable {
    private let done = Mutex<Int64>(0)
    private let report: (@Sendable (Int64) -> Void)?

    /// - Parameter report: called with the number of bytes done.
    package init(_ report: (@Sendable (Int64) -> Void)?) { self.report = report }

    package func reach(_ offset: Int64) {
        guard let report else { return }
        // Called under the lock so that reports arrive in order.
        done.withLock {
            guard offset > $0 else { return }
            $0 = offset
            report(offset)
        }
    }
}
