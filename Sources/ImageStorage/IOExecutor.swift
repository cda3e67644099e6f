import Glibc

/// The threads on which a conversion runs: threads that may block in a system call.
///
/// Swift's default pool has one thread per core, and a `pread` that waits for a disk would hold one
/// of them. Work under `withTaskExecutorPreference(IOExecutor.shared)` runs here instead: child tasks
/// and actors inherit the preference. Threads are started when a job finds none idle and live as long
/// as the process, because the runtime keeps unowned references to an executor for as long as it likes.
public final class IOExecutor: TaskExecutor, @unchecked Sendable {
    public static let shared = IOExecutor()

    /// More blocked jobs than the largest `-m` has workers mean a bug, not a need.
    private static let threadLimit = 80

    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let wakeUp = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    // Guarded by `mutex`:
    private var jobs = JobQueue()
    private var threadCount = 0
    private var idleCount = 0

    private init() {
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(wakeUp, nil)
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        pthread_mutex_lock(mutex)
        jobs.append(job)
        // An idle thread that was signalled but has not run yet still counts as idle, hence the
        // comparison with the queue's length instead of with zero.
        let needsThread = jobs.count > idleCount && threadCount < Self.threadLimit
        if needsThread { threadCount += 1 }
        pthread_cond_signal(wakeUp)
        pthread_mutex_unlock(mutex)
        if needsThread { startThread() }
    }

    private func startThread() {
        var thread = pthread_t()
        let status = pthread_create(
            &thread, nil,
            { context in
                guard let context else { return nil }
                Unmanaged<IOExecutor>.fromOpaque(context).takeUnretainedValue().runJobs()
                return nil
            }, Unmanaged.passUnretained(self).toOpaque())
        if status == 0 {
            pthread_detach(thread)
            return
        }
        pthread_mutex_lock(mutex)
        threadCount -= 1
        let isStuck = threadCount == 0
        pthread_mutex_unlock(mutex)
        // With one thread or more the job will get its turn; with none it never would.
        precondition(!isStuck, "cannot start a thread: \(String(cString: strerror(status)))")
    }

    private func runJobs() {
        while true {
            pthread_mutex_lock(mutex)
            idleCount += 1
            while jobs.isEmpty { pthread_cond_wait(wakeUp, mutex) }
            idleCount -= 1
            let job = jobs.removeFirst()
            pthread_mutex_unlock(mutex)
            job.runSynchronously(on: asUnownedTaskExecutor())
        }
    }
}

/// A first-in-first-out queue whose ends are both cheap.
private struct JobQueue {
    private var incoming: [UnownedJob] = []
    private var outgoing: [UnownedJob] = []

    var count: Int { incoming.count + outgoing.count }
    var isEmpty: Bool { incoming.isEmpty && outgoing.isEmpty }

    mutating func append(_ job: UnownedJob) { incoming.append(job) }

    mutating func removeFirst() -> UnownedJob {
        if outgoing.isEmpty {
            outgoing = incoming.reversed()
            incoming.removeAll(keepingCapacity: true)
        }
        return outgoing.removeLast()
    }
}
