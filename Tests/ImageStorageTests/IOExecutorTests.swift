import Glibc
import Synchronization
import Testing

@testable import ImageStorage

@Suite struct IOExecutorTests {
    /// How many are at it, and how many were at most.
    private final class Counter: Sendable {
        private let counts = Mutex((now: 0, most: 0))
        var most: Int { counts.withLock { $0.most } }
        func add(_ change: Int) {
            counts.withLock {
                $0.now += change
                $0.most = max($0.most, $0.now)
            }
        }
    }

    /// More threads come back from their system calls at once than there are cores for what follows.
    @Test func noMoreComputeThanThereAreCores() async {
        let computing = Counter()
        await withTaskExecutorPreference(IOExecutor.shared) {
            await withDiscardingTaskGroup { group in
                for _ in 0..<4 * IOExecutor.coreCount {
                    group.addTask {
                        for _ in 0..<10 {
                            IOExecutor.mayBlock { _ = usleep(2000) }
                            await IOExecutor.takeCore()
                            computing.add(1)
                            let end = ContinuousClock.now + .milliseconds(3)
                            while ContinuousClock.now < end {}
                            computing.add(-1)
                        }
                    }
                }
            }
        }
        #expect(computing.most <= IOExecutor.coreCount)
    }
}
