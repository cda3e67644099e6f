import DiskImage
import Glibc
import Synchronization

/// The connections to one export, closed when nobody needs them any more.
final class NBDConnectionPool: Sendable {
    let facts: NBDHandle.Facts
    private let connections: [NBDConnection]
    private let turn = Atomic<Int>(0)

    /// Connects as often as the options say and the server allows.
    ///
    /// - Throws: `ImageError` if that fails, or the export is to be written and may only be read.
    init(_ address: NBDAddress, _ options: NBDOptions, forWriting: Bool) throws(ImageError) {
        var all: [NBDConnection] = []
        do throws(ImageError) {
            repeat {
                let loop = try NBDLoop.numbered(all.count % NBDLoop.count)
                let new = try NBDConnection(address, options, loop: loop)
                all.append(new)
                if forWriting, new.facts.isReadOnly {
                    throw ImageError(
                        .system(errno: EROFS), path: address.name, "the export is read-only")
                }
            } while all.count < options.connections(to: address)
                && (all[0].facts.canMultiConn || options.forcesMultiConn)
        } catch {
            for connection in all { connection.close() }
            throw error
        }
        connections = all
        facts = all[0].facts
    }

    deinit { for connection in connections { connection.close() } }

    var count: Int { connections.count }

    /// Hands a request to a connection that has room for it: if there is one, to one whose answers come to this
    /// very thread.
    func submit(_ request: NBDRequest) {
        let start = turn.wrappingAdd(1, ordering: .relaxed).oldValue
        let loop = NBDLoop.current
        var best = connections[start % count]
        var bestCost = Int.max
        for index in 0..<count {
            let connection = connections[(start &+ index) % count]
            let load = connection.load.load(ordering: .relaxed)
            let cost = 2 * max(0, load + 1 - connection.limit) + (connection.loop === loop ? 0 : 1)
            if cost < bestCost {
                best = connection
                bestCost = cost
            }
        }
        best.submit(request)
    }

    /// Hands one request to each connection.
    func submitToEach(_ requests: [NBDRequest]) {
        for (connection, request) in zip(connections, requests) { connection.submit(request) }
    }

    /// Gives up everything that is in flight.
    func abort() { for connection in connections { connection.abort() } }
}
