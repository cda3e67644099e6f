import CLinux
import DiskImage
import Glibc
import Synchronization

/// The threads on which a conversion runs: threads that may block in a system call.
///
/// Swift's default pool has one thread per core, and a `pread` that waits for a disk would hold one
/// of them. Work under `IOExecutor.run` runs here instead: child tasks
/// and actors inherit the preference. Threads are started when a job finds none idle and live as long
/// as the process, because the runtime keeps unowned references to an executor for as long as it likes.
///
/// Waking a thread costs more than most jobs take: a task that enters or leaves an actor is a new job
/// each time. So a job that comes from one of these threads wakes nobody at once. That thread takes it
/// itself when it is done, and mostly that is soon; what takes longer says so (`willBeBusy`).
///
/// And no more threads compute than there are cores: more would take turns on them, each with a buffer
/// of its own in the cache. Only for a thread that may sleep in a system call (`mayBlock`) another
/// one comes.
public final class IOExecutor: TaskExecutor, @unchecked Sendable {
    public static let shared = IOExecutor()

    /// How many cores this process may use.
    public static let coreCount = max(1, Int(clinux_core_count()))

    /// More blocked jobs than the largest `-m` has workers mean a bug, not a need.
    private static let threadLimit = 80

    /// How often a thread looks for a job before it goes to sleep: about 50 µs.
    private static let glances = 1000

    /// How long a thread is lent that others wait for.
    private static let loanTime: Duration = .microseconds(500)

    /// After how many vain times it looks out only once in as many.
    private static let vainLimit = 16

    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let wakeUp = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    /// The role of a thread that is lent; the executor's own have that of the mutex.
    private var lent: UnsafeMutableRawPointer { UnsafeMutableRawPointer(wakeUp) }
    /// How many jobs wait for a thread, to be looked at without the mutex.
    private let waitingCount = Atomic<Int>(0)
    // Guarded by `mutex`:
    private var jobs = JobQueue()
    private var threadCount = 0
    private var idleCount = 0
    /// Threads that have a job and are not in a system call.
    private var busyCount = 0
    /// A thread has been called and has not yet come. It calls the next one if there is more to do.
    private var isCalling = false
    /// How often a thread had nothing to do, and how many times in a row none came while it looked out.
    private var idleTimes = 0
    private var vainLookouts = 0

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
        guard threadCount == 0 else { return 0 }
        let status = startThread { self.runJobs() }
        // The thread waits for the mutex: it finds this.
        if status == 0 { (threadCount, isCalling) = (1, true) }
        return status
    }

    public func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        pthread_mutex_lock(mutex)
        jobs.append(job)
        waitingCount.store(jobs.count, ordering: .relaxed)
        pthread_mutex_unlock(mutex)
        if clinux_thread_role() == nil { callThread() }
    }

    /// To be called before a computation that may take long: the jobs that this thread has made get
    /// another one now, if a core is free.
    public static func willBeBusy() {
        if shared.waitingCount.load(ordering: .relaxed) > 0 { shared.callThread() }
    }

    /// To be called instead where the computation wants memory of its own: whoever comes back from a system call that
    /// slept finds the cores taken by others, and goes to the end of the queue.
    public static func takeCore() async {
        if shared.isCrowded { await Task.yield() }
        willBeBusy()
    }

    /// More threads compute than there are cores.
    private var isCrowded: Bool {
        guard clinux_thread_role() != nil else { return false }
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return busyCount > Self.coreCount
    }

    /// Lends a thread that answers others: those whom it resumes within `answers` go on right here, without the time
    /// and the price of waking somebody, if there is a core for them.
    ///
    /// - Returns: false if that took long, or would have to wait for a file, and the thread was not there for its own
    ///   work meanwhile.
    public static func lendThread(after answers: () -> Void) -> Bool {
        clinux_set_thread_role(shared.lent)
        answers()
        var isSoon = shared.runWaitingJobs(until: .now + loanTime)
        if clinux_thread_role() != shared.lent { isSoon = false }
        clinux_set_thread_role(nil)
        if !isSoon { willBeBusy() }
        return isSoon
    }

    private func runWaitingJobs(until end: ContinuousClock.Instant) -> Bool {
        while waitingCount.load(ordering: .relaxed) > 0 {
            guard ContinuousClock.now < end else { return false }
            pthread_mutex_lock(mutex)
            // Whoever has the last core looks for more when done.
            guard !jobs.isEmpty, busyCount < Self.coreCount else {
                pthread_mutex_unlock(mutex)
                break
            }
            let job = jobs.removeFirst()
            waitingCount.store(jobs.count, ordering: .relaxed)
            busyCount += 1
            pthread_mutex_unlock(mutex)
            job.runSynchronously(on: asUnownedTaskExecutor())
            pthread_mutex_lock(mutex)
            busyCount -= 1
            pthread_mutex_unlock(mutex)
        }
        return ContinuousClock.now < end
    }

    /// Makes a system call that may sleep. Its core can work for others meanwhile.
    static func mayBlock<T>(_ call: () -> T) -> T {
        let mark = clinux_thread_role()
        let isOwn = mark != nil
        if mark == shared.lent { clinux_set_thread_role(shared.mutex) }
        if isOwn { shared.callThread(freeing: 1) }
        let result = call()
        if isOwn {
            // Taking a lock leaves no trace in errno.
            pthread_mutex_lock(shared.mutex)
            shared.busyCount += 1
            pthread_mutex_unlock(shared.mutex)
        }
        return result
    }

    /// Sees to it that a thread comes for what waits, if there is a core for it.
    ///
    /// - Parameter freed: how many cores the caller leaves.
    private func callThread(freeing freed: Int = 0) {
        pthread_mutex_lock(mutex)
        busyCount -= freed
        let isNeeded = !jobs.isEmpty && !isCalling && busyCount < Self.coreCount
        let wakesOne = isNeeded && idleCount > 0
        let startsOne = isNeeded && !wakesOne && threadCount < Self.threadLimit
        if wakesOne || startsOne { isCalling = true }
        if startsOne { threadCount += 1 }
        pthread_mutex_unlock(mutex)
        if wakesOne { pthread_cond_signal(wakeUp) }
        if startsOne { addThread() }
    }

    private func addThread() {
        let status = startThread { self.runJobs() }
        guard status != 0 else { return }
        pthread_mutex_lock(mutex)
        threadCount -= 1
        isCalling = false
        let isStuck = threadCount == 0
        pthread_mutex_unlock(mutex)
        // With one thread or more the job will get its turn, and `start` made sure of the first.
        precondition(!isStuck, "cannot start a thread: \(String(cString: strerror(status)))")
    }

    /// Waits for a job for a moment without sleeping. Whoever does counts as called, so nobody is woken
    /// meanwhile, and there is never more than one. A thread that sleeps comes after 50 to 100 µs on a
    /// virtual machine, in the time of a chunk: two workers on two cores had 1.4 of them.
    ///
    /// - Returns: whether there is one.
    private func lookOut() -> Bool {
        for _ in 0..<Self.glances {
            if waitingCount.load(ordering: .relaxed) > 0 { return true }
            clinux_relax()
        }
        return false
    }

    private func runJobs() {
        clinux_set_thread_role(mutex)
        // A thread that has just been started has been called.
        var wasCalled = true
        pthread_mutex_lock(mutex)
        while true {
            if jobs.isEmpty, busyCount < Self.coreCount, !isCalling || wasCalled {
                isCalling = true
                wasCalled = true
                idleTimes += 1
                // Where that was in vain several times, somebody else may have a use for the core.
                if vainLookouts < Self.vainLimit || idleTimes % Self.vainLimit == 0 {
                    pthread_mutex_unlock(mutex)
                    let isFound = lookOut()
                    pthread_mutex_lock(mutex)
                    vainLookouts = isFound ? 0 : vainLookouts + 1
                }
            }
            while jobs.isEmpty || busyCount >= Self.coreCount {
                if wasCalled { isCalling = false }
                idleCount += 1
                pthread_cond_wait(wakeUp, mutex)
                idleCount -= 1
                wasCalled = true
            }
            if wasCalled { isCalling = false }
            let job = jobs.removeFirst()
            waitingCount.store(jobs.count, ordering: .relaxed)
            busyCount += 1
            let leavesMore = wasCalled && !jobs.isEmpty
            pthread_mutex_unlock(mutex)
            wasCalled = false
            if leavesMore { callThread() }
            job.runSynchronously(on: asUnownedTaskExecutor())
            pthread_mutex_lock(mutex)
            busyCount -= 1
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
