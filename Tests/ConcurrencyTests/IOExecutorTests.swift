import Glibc
import Synchronization
import Testing

@testable import Concurrency

@Suite struct IOExecutorTests {
    /// Counts the tasks at work, and the most at one time.
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

    /// All jobs can sleep in system calls at once, and no core stays idle because of them.
    @Test func systemCallsOverlap() async {
        let calling = Counter()
        let jobs = 4 * IOExecutor.coreCount
        await withTaskExecutorPreference(IOExecutor.shared) {
            await withDiscardingTaskGroup { group in
                for _ in 0..<jobs {
                    group.addTask {
                        calling.add(1)
                        IOExecutor.mayBlock {
                            let end = ContinuousClock.now + .seconds(20)
                            while calling.most < jobs, ContinuousClock.now < end { usleep(1000) }
                        }
                        calling.add(-1)
                    }
                }
            }
        }
        #expect(calling.most == jobs)
    }

    /// No more jobs compute at once than there are cores.
    @Test func noMoreJobsThanThereAreCores() async {
        let computing = Counter()
        await withTaskExecutorPreference(IOExecutor.shared) {
            await withDiscardingTaskGroup { group in
                for _ in 0..<8 * IOExecutor.coreCount {
                    group.addTask {
                        computing.add(1)
                        let end = ContinuousClock.now + .milliseconds(3)
                        while ContinuousClock.now < end {}
                        computing.add(-1)
                    }
                }
            }
        }
        #expect(computing.most <= IOExecutor.coreCount)
    }
}
