import DiskImage
import Glibc
import Synchronization

/// The connections to one export: one is made at once, others when requests need them.
final class NBDConnectionPool: Sendable {
    let facts: NBDHandle.Facts
    /// Whether the server is on this machine.
    let isServerLocal: Bool
    private let connections: [NBDConnection]
    private let turn = Atomic<Int>(0)

    /// Makes one connection, and prepares as many more as the options say and the server allows.
    ///
    /// - Throws: `ImageError` if that fails, or if the export is to be written and is read-only.
    init(_ address: NBDAddress, _ options: NBDOptions, forWriting: Bool) throws(ImageError) {
        let firstLoop = try NBDLoop.numbered(0)
        let handle = try NBDHandle(
            address, timeout: options.timeout, isGivenUp: { Task.isCancelled })
        let (facts, isServerLocal) = (handle.facts, handle.isServerLocal)
        var all = [
            NBDConnection(
                address, options, loop: firstLoop, facts: facts, isServerLocal: isServerLocal,
                handle: handle)
        ]
        do throws(ImageError) {
            if forWriting, facts.isReadOnly {
                throw ImageError(
                    .system(errno: EROFS), path: address.name, "the export is read-only")
            }
            let allowsMore = facts.canMultiConn || options.forcesMultiConn
            while allowsMore, all.count < options.connections(isServerLocal: isServerLocal) {
                let loop = try NBDLoop.numbered(all.count % NBDLoop.count)
                all.append(
                    NBDConnection(
                        address, options, loop: loop, facts: facts, isServerLocal: isServerLocal))
            }
        } catch {
            for connection in all { connection.close() }
            throw error
        }
        connections = all
        self.facts = facts
        self.isServerLocal = isServerLocal
    }

    deinit { for connection in connections { connection.close() } }

    var count: Int { connections.count }

    /// Hands a request to a connection that has room for it; one that has to be made first is used
    /// only if the others are full.
    func submit(_ request: NBDRequest) {
        let start = turn.wrappingAdd(1, ordering: .relaxed).oldValue
        var best = connections[start % count]
        var bestCost = Int.max
        for index in 0..<count {
            let connection = connections[(start &+ index) % count]
            let load = connection.load.load(ordering: .relaxed)
            let cost =
                2 * max(0, load + 1 - connection.comfort) + (connection.isOpened ? 0 : 1)
            if cost < bestCost {
                best = connection
                bestCost = cost
            }
        }
        best.submit(request)
    }

    /// Number of times that lost connections were made anew, over all connections.
    var renewals: Int {
        connections.reduce(0) { $0 + $1.renewals.load(ordering: .sequentiallyConsistent) }
    }

    /// The connections that a request has needed so far.
    var opened: [NBDConnection] { connections.filter(\.isOpened) }

    /// Gives up all requests in flight.
    func abort() { for connection in connections { connection.abort() } }
}
