/// The numbers of an executor's threads, which tell when another thread is needed. Pure.
///
/// At most as many threads compute as there are cores: more would take turns, each with a buffer of
/// its own in the cache. Only a thread that may sleep in a system call is replaced by another one.
struct ThreadRoster {
    /// The thread that the executor has to call for a waiting job.
    enum Call: Equatable {
        case nobody
        case idleThread
        case newThread
    }

    private let cores: Int
    /// Largest number of threads.
    private let limit: Int
    private(set) var threads = 0
    /// Number of threads that sleep for lack of a job and have not been called.
    private(set) var idle = 0
    /// Number of threads that have a core: they compute, or have been called.
    private(set) var busy = 0
    /// Number of threads that have been called and have not arrived yet.
    private(set) var coming = 0

    init(cores: Int, limit: Int) {
        self.cores = cores
        self.limit = limit
    }

    /// Decides which thread to call. Call this whenever a job arrives or a core becomes free.
    ///
    /// - Parameter jobs: number of waiting jobs.
    mutating func call(for jobs: Int) -> Call {
        guard jobs > coming, busy < cores, idle > 0 || threads < limit else { return .nobody }
        busy += 1
        coming += 1
        if idle > 0 {
            idle -= 1
            return .idleThread
        }
        threads += 1
        return .newThread
    }

    /// Notes that a called thread has arrived.
    mutating func arrive() { coming -= 1 }

    /// Notes that the called new thread could not be started.
    mutating func fail() {
        threads -= 1
        busy -= 1
        coming -= 1
    }

    /// Whether a thread that has finished a job may take the next one. It may not if threads that
    /// came back from system calls use all cores.
    var mayGoOn: Bool { busy <= cores }

    /// Notes that a thread goes to sleep, because there is no job or no core for it.
    mutating func rest() {
        busy -= 1
        idle += 1
    }

    /// Notes that a thread begins a system call in which it may sleep.
    mutating func leaveCore() { busy -= 1 }

    /// Notes that the system call has returned, whether or not there is a core for the thread.
    mutating func comeBack() { busy += 1 }
}
