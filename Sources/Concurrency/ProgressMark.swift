import Synchronization

/// The progress of all workers together; it never goes back.
///
/// Chunks that have been begun count half. A small disk is in flight as a whole while a slow storage
/// answers: counted by what is done alone, all of its progress would come at the end.
package final class ProgressMark: Sendable {
    private struct State {
        var begun: Int64 = 0
        var done: Int64 = 0

        /// Between the two, without overflow.
        var middle: Int64 { done + (begun - done) / 2 }
    }

    private let state = Mutex(State())
    private let report: (@Sendable (Int64) -> Void)?

    /// - Parameter report: called with the number of bytes done.
    package init(_ report: (@Sendable (Int64) -> Void)?) { self.report = report }

    package func begin(_ offset: Int64) { update { $0.begun = max($0.begun, offset) } }

    package func reach(_ offset: Int64) {
        update {
            $0.done = max($0.done, offset)
            $0.begun = max($0.begun, offset)
        }
    }

    private func update(_ change: (inout State) -> Void) {
        guard let report else { return }
        // Called under the lock so that reports arrive in order.
        state.withLock {
            let old = $0.middle
            change(&$0)
            if $0.middle > old { report($0.middle) }
        }
    }
}
