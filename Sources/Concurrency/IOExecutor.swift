import CLinux
import DiskImage
import Glibc

/// The threads on which a conversion runs: threads that may block in a system call.
///
/// Swift's default pool has one thread per core, and a `pread` that waits for a disk would hold one
/// of them. Work under `IOExecutor.run` runs here instead: child tasks and actors inherit the
/// preference. `ThreadRoster` decides how many threads there are. They live as long as the process,
/// because the runtime keeps unowned references to an executor for as long as it likes.
public final class IOExecutor: TaskExecutor, @unchecked Sendable {
    public static let shared = IOExecutor()

    /// How many cores this process may use.
    public static let coreCount = max(1, Int(clinux_core_count()))

    /// More blocked jobs than the largest `-m` has workers mean a bug, not a need.
    private static let threadLimit = 80

    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let wakeUp = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    // Guarded by `mutex`:
    private var jobs = JobQueue()
    private var roster = ThreadRoster(cores: coreCount, limit: threadLimit)
    /// How many of the threads that sleep have been called.
    private var calls = 0

    private init() {
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(wakeUp, nil)
    }

    /// Runs a body, and the tasks that it makes, on the threads of the executor.
    ///
    /// - Throws: `ImageError` if not one thread can be had; what the body throws.
    public static func run<Value>(
        isolation: isolated (any Actor)? = #isolation, _ body: () async throws -> Value
    ) async throws -> Value {
        try start()
        return try await withTaskExecutorPreference(shared, operation: body)
    }

    /// Makes sure of the first thread. A job cannot fail for want of one, so this has to come
    /// before the first job; where the system grants no others, the one does all the work.
    public static func start() throws(ImageError) {
        let status = shared.startFirstThread()
        guard status != 0 else { return }
        throw ImageError(
            .system(errno: status), "cannot start a thread: \(String(cString: strerror(status)))")
    }

    private func startFirstThread() -> Int32 {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        guard roster.threads == 0 else { return 0 }
        // It counts as called for a job, and waits for the mutex.
        _ = roster.call(for: 1)
        let status = startThread { self.runJobs() }
        if status != 0 { roster.fail() }
        return status
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        pthread_mutex_lock(mutex)
        jobs.append(job)
        unlockAndCall()
    }

    /// Makes a system call that may sleep. Its core can work for others meanwhile.
    package static func mayBlock<T>(_ call: () -> T) -> T {
        guard clinux_is_executor_thread() else { return call() }
        pthread_mutex_lock(shared.mutex)
        shared.roster.leaveCore()
        shared.unlockAndCall()
        let result = call()
        // Taking a lock leaves no trace in errno.
        pthread_mutex_lock(shared.mutex)
        shared.roster.comeBack()
        pthread_mutex_unlock(shared.mutex)
        return result
    }

    /// Releases the mutex, and calls a thread for the jobs that wait if there is a core for it.
    private func unlockAndCall() {
        let call = roster.call(for: jobs.count)
        if call == .idleThread { calls += 1 }
        pthread_mutex_unlock(mutex)
        switch call {
        case .nobody: break
        case .idleThread: pthread_cond_signal(wakeUp)
        case .newThread: addThread()
        }
    }

    private func addThread() {
        let status = startThread { self.runJobs() }
        guard status != 0 else { return }
        pthread_mutex_lock(mutex)
        roster.fail()
        // With one thread or more the job will get its turn, and `start` made sure of the first.
        precondition(
            roster.threads > 0, "cannot start a thread: \(String(cString: strerror(status)))")
        // Another thread may have gone to sleep because that one was coming.
        guard roster.idle > 0 else {
            _ = pthread_mutex_unlock(mutex)
            return
        }
        unlockAndCall()
    }

    private func runJobs() {
        clinux_become_executor_thread()
        pthread_mutex_lock(mutex)
        while true {
            roster.arrive()
            while !jobs.isEmpty, roster.mayGoOn {
                let job = jobs.removeFirst()
                // A thread that was called for one job may have found several.
                unlockAndCall()
                job.runSynchronously(on: asUnownedTaskExecutor())
                pthread_mutex_lock(mutex)
            }
            roster.rest()
            while calls == 0 { pthread_cond_wait(wakeUp, mutex) }
            calls -= 1
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
