import Foundation
import Glibc
import Synchronization

/// An NBD server on a unix socket that deliberately violates the protocol in one way.
///
/// It implements as much of the protocol as clients need to reach the fault
/// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
public final class RogueServer: Sendable {
    public enum Fault: Sendable {
        /// The first answer to a read begins with a wrong magic number.
        case wrongMagic
        /// The answer to a block status request contains no descriptor.
        case emptyBlockStatus
        /// The server advertises WRITE_ZEROES but answers it with ENOTSUP.
        case refusesZeroes
        /// The connection closes in the middle of the first long answer.
        case breaksOff
        /// After the first read the server receives nothing more; its answer comes 300 ms later.
        case stopsListening
        /// No fault, but each read takes 20 ms, independent of the number in flight.
        case takesItsTime
    }

    public let socket: String
    private let fault: Fault
    private let size: Int
    private let listener: Int32
    private let folder: TempFolder
    private let state: Mutex<(bytes: [UInt8], zeroRequests: Int, connections: Int)>
    private let reads = Mutex((now: 0, most: 0))

    public init(_ fault: Fault, size: Int) throws {
        folder = try TempFolder()
        let socket = folder.path("socket")
        self.socket = socket
        self.fault = fault
        self.size = size
        state = Mutex(([UInt8](repeating: 0xee, count: size), 0, 0))
        let listener = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        self.listener = listener
        guard withAddress(socket, { bind(listener, $0, $1) }) == 0, listen(listener, 16) == 0
        else { throw CommandError(description: "no socket: \(String(cString: strerror(errno)))") }
        Thread.detachNewThread { [weak self] in
            while true {
                let client = accept(listener, nil, nil)
                guard client >= 0 else { return }
                guard let self else { return }
                self.state.withLock { $0.connections += 1 }
                Thread.detachNewThread {
                    if self.negotiate(client) { self.serve(client) }
                    // shutdown, because a process started by another test may have inherited the
                    // socket.
                    shutdown(client, Int32(SHUT_RDWR))
                    close(client)
                }
            }
        }
    }

    deinit {
        shutdown(listener, Int32(SHUT_RDWR))
        close(listener)
    }

    public var uri: String { "nbd+unix:///?socket=\(socket)" }

    /// The content of the export, the number of zero requests and the number of connections.
    public var bytes: [UInt8] { state.withLock { $0.bytes } }
    public var zeroRequests: Int { state.withLock { $0.zeroRequests } }
    public var connections: Int { state.withLock { $0.connections } }
    /// The largest number of reads in flight at once.
    public var mostReads: Int { reads.withLock { $0.most } }

    // MARK: The handshake

    private enum Option {
        static let abort: UInt32 = 2
        static let go: UInt32 = 7
        static let structuredReplies: UInt32 = 8
        static let setMetaContext: UInt32 = 10
    }

    private func negotiate(_ client: Int32) -> Bool {
        // NBDMAGIC, IHAVEOPT and the flags FIXED_NEWSTYLE and NO_ZEROES.
        send(client, Array("NBDMAGICIHAVEOPT".utf8) + number(UInt16(3)))
        guard receive(client, 4) != nil else { return false }
        while let head = receive(client, 16) {
            let option = value(head[8..<12], UInt32.self)
            guard receive(client, Int(value(head[12..<16], UInt32.self))) != nil else { break }
            func reply(_ type: UInt32, _ data: [UInt8] = []) {
                send(
                    client,
                    number(UInt64(0x3_e889_0455_65a9)) + number(option) + number(type)
                        + number(UInt32(data.count)) + data)
            }
            switch option {
            case Option.structuredReplies where fault == .emptyBlockStatus: reply(1)
            case Option.setMetaContext where fault == .emptyBlockStatus:
                reply(4, number(UInt32(7)) + Array("base:allocation".utf8))
                reply(1)
            case Option.go:
                // HAS_FLAGS, SEND_FLUSH, SEND_WRITE_ZEROES.
                let flags: UInt16 = 1 | 1 << 2 | 1 << 6
                reply(3, number(UInt16(0)) + number(UInt64(size)) + number(flags))
                reply(1)
                return true
            case Option.abort:
                reply(1)
                return false
            default: reply(1 << 31 | 1)
            }
        }
        return false
    }

    // MARK: Requests

    private func readLater(
        _ client: Int32, _ handle: [UInt8], _ start: Int, _ length: Int, _ answering: Answering
    ) {
        reads.withLock {
            $0.now += 1
            $0.most = max($0.most, $0.now)
        }
        Thread.detachNewThread {
            usleep(20_000)
            self.reads.withLock { $0.now -= 1 }
            let data = self.state.withLock { Array($0.bytes[start..<start + length]) }
            answering.turn.withLock { _ in
                self.answer(client, handle)
                send(client, data)
            }
        }
    }

    /// Serializes the answers of several threads.
    private final class Answering: Sendable { let turn = Mutex(()) }

    private func serve(_ client: Int32) {
        let answering = Answering()
        while let head = receive(client, 28) {
            let type = value(head[6..<8], UInt16.self)
            let handle = Array(head[8..<16])
            let range = Int(value(head[16..<24], UInt64.self))
            let length = Int(value(head[24..<28], UInt32.self))
            switch type {
            case 0 where fault == .takesItsTime:
                readLater(client, handle, range, length, answering)
            case 0: guard read(client, handle, range, length) else { return }
            case 1:
                guard let data = receive(client, length) else { return }
                state.withLock { $0.bytes.replaceSubrange(range..<range + length, with: data) }
                answer(client, handle)
            case 2: return
            case 3: answer(client, handle)
            case 6:
                state.withLock { $0.zeroRequests += 1 }
                answer(client, handle, error: UInt32(ENOTSUP))
            case 7:
                // A final reply chunk of the block status type that contains only the context
                // number.
                send(
                    client,
                    number(UInt32(0x668e_33ef)) + number(UInt16(1)) + number(UInt16(5)) + handle
                        + number(UInt32(4)) + number(UInt32(7)))
            default: answer(client, handle, error: UInt32(EINVAL))
            }
        }
    }

    private func read(_ client: Int32, _ handle: [UInt8], _ start: Int, _ length: Int) -> Bool {
        let data = state.withLock { Array($0.bytes[start..<start + length]) }
        switch fault {
        case .wrongMagic:
            send(client, number(UInt32(0xdead_beef)) + number(UInt32(0)) + handle + data)
        case .breaksOff:
            send(client, number(UInt32(0x6744_6698)) + number(UInt32(0)) + handle)
            send(client, Array(data.prefix(length / 2)))
            return false
        case .stopsListening:
            shutdown(client, Int32(SHUT_RD))
            usleep(300_000)
            answer(client, handle)
            send(client, data)
            sleep(10)
            return false
        case .emptyBlockStatus:
            send(
                client,
                number(UInt32(0x668e_33ef)) + number(UInt16(1)) + number(UInt16(1)) + handle
                    + number(UInt32(8 + length)) + number(UInt64(start)) + data)
        case .refusesZeroes, .takesItsTime:
            answer(client, handle)
            send(client, data)
        }
        return true
    }

    private func answer(_ client: Int32, _ handle: [UInt8], error: UInt32 = 0) {
        send(client, number(UInt32(0x6744_6698)) + number(error) + handle)
    }
}

private func number(_ number: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: number.bigEndian) { Array($0) }
}

private func value<T: FixedWidthInteger>(_ bytes: ArraySlice<UInt8>, _ type: T.Type) -> T {
    bytes.reduce(0) { $0 << 8 | T($1) }
}

private func send(_ socket: Int32, _ bytes: [UInt8]) {
    var rest = bytes[...]
    while !rest.isEmpty {
        let count = rest.withUnsafeBytes {
            send(socket, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
        }
        guard count > 0 else { return }
        rest = rest.dropFirst(count)
    }
}

private func receive(_ socket: Int32, _ count: Int) -> [UInt8]? {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
        let got = bytes.withUnsafeMutableBytes {
            recv(socket, $0.baseAddress.map { $0 + done }, count - done, 0)
        }
        guard got > 0 else { return nil }
        done += got
    }
    return bytes
}
