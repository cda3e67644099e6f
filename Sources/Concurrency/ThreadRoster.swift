/// Which threads of an executor work, and when another one is needed. Pure.
///
/// No more threads compute than there are cores: more would take turns on them, each with a buffer
/// of its own in the cache. Only for a thread that may sleep in a system call another one comes.
struct ThreadRoster {
    /// The thread that the executor has to call for a job that waits.
    enum Call: Equatable {
        case nobody
        case idleThread
        case newThread
    }

    private let cores: Int
    /// The largest number of threads.
    private let limit: Int
    private(set) var threads = 0
    /// The number of threads that sleep for want of a job, and have not been called.
    private(set) var idle = 0
    /// The number of threads that have a core: they compute, or have been called.
    private(set) var busy = 0
    /// The number of threads that have been called and are not there yet.
    private(set) var coming = 0

    init(cores: Int, limit: Int) {
        self.cores = cores
        self.limit = limit
    }

    /// To be asked whenever a job or a core has become free.
    ///
    /// - Parameter jobs: how many wait.
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

    /// A thread that was called is there.
    mutating func arrive() { coming -= 1 }

    /// The new thread that was called could not be had.
    mutating func fail() {
        threads -= 1
        busy -= 1
        coming -= 1
    }

    /// Whether a thread that is done with a job may take the next one: not if others have come back
    /// to all cores.
    var mayGoOn: Bool { busy <= cores }

    /// A thread has nothing to do, or no core to do it on, and goes to sleep.
    mutating func rest() {
        busy -= 1
        idle += 1
    }

    /// A thread begins a system call in which it may sleep.
    mutating func leaveCore() { busy -= 1 }

    /// The system call has returned, whether there is a core for the thread or not.
    mutating func comeBack() { busy += 1 }
}
