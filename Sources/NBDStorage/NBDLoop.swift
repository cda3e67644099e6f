import CLinux
import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// A thread that waits for the answers of several connections, of sources and targets alike.
///
/// Loops are few and live as long as the process.
final class NBDLoop: @unchecked Sendable {
    /// Number of loops: one for each core, so that all cores can decrypt and copy, and at most 8,
    /// which are enough for any server.
    static let count = min(8, IOExecutor.coreCount)
    private static let started = Mutex<[Int: NBDLoop]>([:])

    let number: Int
    /// Event descriptor that wakes the thread.
    private let descriptor: Int32
    private let isAsleep = Atomic<Bool>(false)
    /// Whether a member has been called, or a connection added.
    private let isCalled = Atomic<Bool>(false)
    private let newcomers = Mutex<[NBDConnection]>([])

    // Used by the thread only:
    private var members: [NBDConnection] = []
    /// The descriptors to wait for: first the loop's own, then one for each member.
    private var polled: [pollfd] = []

    /// The loop with a number below `count`, started at its first use.
    static func numbered(_ number: Int) throws(ImageError) -> NBDLoop {
        try started.withLock { started throws(ImageError) in
            if let loop = started[number] { return loop }
            let loop = try NBDLoop(number)
            started[number] = loop
            return loop
        }
    }

    private init(_ number: Int) throws(ImageError) {
        self.number = number
        descriptor = clinux_eventfd()
        guard descriptor >= 0 else { throw Self.failure(errno) }
        polled = [pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)]
        let status = startThread { self.run() }
        guard status == 0 else {
            _ = Glibc.close(descriptor)
            throw Self.failure(status)
        }
    }

    private static func failure(_ status: Int32) -> ImageError {
        Syscall.failure(nil, "cannot start a thread for NBD", errno: status)
    }

    /// Takes a connection in, until the connection says that it has ended.
    func add(_ connection: NBDConnection) {
        newcomers.withLock { $0.append(connection) }
        call()
    }

    /// Notes that something has changed for a member, which knows what, and wakes the thread.
    func call() {
        isCalled.store(true, ordering: .sequentiallyConsistent)
        guard isAsleep.exchange(false, ordering: .sequentiallyConsistent) else { return }
        var one: UInt64 = 1
        _ = Glibc.write(descriptor, &one, MemoryLayout<UInt64>.size)
    }

    private func run() {
        while true {
            while isCalled.exchange(false, ordering: .sequentiallyConsistent) {
                adoptNewcomers()
                for index in members.indices where members[index].takeCall() {
                    advance(index, after: 0)
                }
                removeEnded()
            }
            isAsleep.store(true, ordering: .sequentiallyConsistent)
            guard !isCalled.load(ordering: .sequentiallyConsistent) else {
                isAsleep.store(false, ordering: .sequentiallyConsistent)
                continue
            }
            let count = poll(&polled, nfds_t(polled.count), pollTime)
            isAsleep.store(false, ordering: .sequentiallyConsistent)
            if polled[0].revents != 0 { silence() }
            for index in members.indices {
                let happened = count > 0 ? polled[index + 1].revents : 0
                if happened != 0 || members[index].isTimed { advance(index, after: happened) }
            }
            removeEnded()
        }
    }

    private func adoptNewcomers() {
        let new = newcomers.withLock { newcomers in
            defer { newcomers = [] }
            return newcomers
        }
        for connection in new {
            members.append(connection)
            polled.append(pollfd(fd: -1, events: 0, revents: 0))
            advance(members.count - 1, after: 0)
        }
    }

    /// Lets a member do its work, and lets the tasks that waited for answers go on.
    private func advance(_ index: Int, after events: Int16) {
        var events = events
        repeat {
            let (wish, answers) = members[index].advance(after: events)
            polled[index + 1] = wish
            for answer in answers { answer.tell() }
            // A thread that posted a request meanwhile has left the sending to this thread.
            events = 0
        } while !members[index].isIdle
    }

    private func removeEnded() {
        for index in members.indices.reversed() where members[index].hasEnded {
            members.remove(at: index)
            polled.remove(at: index + 1)
        }
    }

    /// Timeout in milliseconds. Requests begin while this thread sleeps, so it has to look for
    /// overdue ones now and then.
    private var pollTime: Int32 { members.contains { $0.isTimed } ? 200 : -1 }

    private func silence() {
        var count: UInt64 = 0
        _ = Glibc.read(descriptor, &count, MemoryLayout<UInt64>.size)
    }
}
