import CLinux
import DiskImage
import Glibc

/// The threads on which a conversion runs: threads that may block in a system call.
///
/// Swift's default pool has one thread per core, and a `pread` that waits for a disk would hold one
/// of them. Work under `IOExecutor.run` runs here instead: child tasks and actors inherit the
/// preference. `ThreadRoster` decides how many threads there are. The threads live as long as the
/// process, because the runtime may use its unowned references to an executor at any time.
public final class IOExecutor: TaskExecutor, @unchecked Sendable {
    public static let shared = IOExecutor()

    /// Number of cores that this process may use.
    public static let coreCount = max(1, Int(clinux_core_count()))

    /// Largest number of threads. The largest `-m` has 64 workers, so more blocked jobs are a bug.
    private static let threadLimit = 80

    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let wakeUp = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    // Guarded by `mutex`:
    private var jobs = JobQueue()
    private var roster = ThreadRoster(cores: coreCount, limit: threadLimit)
    /// Number of sleeping threads that have been called.
    private var calls = 0

    private init() {
        pthread_mutex_init(mutex, nil)
        pthread_cond_init(wakeUp, nil)
    }

    /// Runs a body and its child tasks on the threads of the executor.
    ///
    /// - Throws: `ImageError` if the system grants no thread at all; any error of the body.
    public static func run<Value>(
        isolation: isolated (any Actor)? = #isolation, _ body: () async throws -> Value
    ) async throws -> Value {
        try start()
        return try await withTaskExecutorPreference(shared, operation: body)
    }

    /// Starts the first thread, which has to exist before the first job, because a job cannot fail
    /// for lack of a thread. If the system grants no others, this one does all the work.
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
        // The new thread counts as called for a job, and waits for the mutex.
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

    /// Makes a system call that may sleep, and lets another thread use the core meanwhile.
    package static func mayBlock<T>(_ call: () -> T) -> T {
        guard clinux_is_executor_thread() else { return call() }
        pthread_mutex_lock(shared.mutex)
        shared.roster.leaveCore()
        shared.unlockAndCall()
        let result = call()
        // Locking the mutex does not change errno.
        pthread_mutex_lock(shared.mutex)
        shared.roster.comeBack()
        pthread_mutex_unlock(shared.mutex)
        return result
    }

    /// Releases the mutex, and calls a thread for the waiting jobs if there is a core for it.
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
        // One thread is enough for the job to get its turn, and `start` made sure of the first.
        precondition(
            roster.threads > 0, "cannot start a thread: \(String(cString: strerror(status)))")
        // Another thread may have gone to sleep because this one was expected.
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
                // A thread that was called for one job may find several.
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

/// A first-in-first-out queue that is cheap at both ends.
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
