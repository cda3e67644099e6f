import Concurrency
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// Reads ranges of a file, and reads ahead for short reads that follow each other.
///
/// Tables and compressed clusters are read in small pieces, each of which would cost a request.
/// Where one lies behind what has been read ahead, the next blocks are read as a whole. Long reads
/// are requests of their own, straight into the caller's memory.
final class HTTPBlocks: Sendable {
    /// Length of a block in bytes.
    private static let blockSize: Int64 = 2 << 20
    /// Number of blocks that are read ahead at most, of a server that is far away and of another:
    /// decompressing two blocks takes about ten milliseconds.
    private static let ahead: (far: Int64, near: Int64) = (8, 2)
    /// Number of blocks behind the first reader that are kept for the last one.
    private static let behind = 2
    /// Length in bytes from which a read is a request of its own.
    private static let longRead: Int64 = 512 << 10

    private typealias Block = Task<BlockBytes, any Error>

    private let file: HTTPFile
    /// Offset in bytes of the first block; what lies before is known.
    private let start: Int64
    private let blocks = Mutex<[Int64: Block]>([:])
    private let buffers = IOBufferPool()
    /// Number of the block in which the rest of the file begins.
    private var first: Int64 { start / Self.blockSize }

    init(_ file: HTTPFile, from start: Int64) {
        self.file = file
        self.start = start
    }

    func read(_ range: Range<Int64>, into memory: UnsafeMutableRawBufferPointer) async throws {
        let pieces = blocks.withLock { plan(range, &$0) }
        for piece in pieces {
            let place = Int(piece.range.lowerBound - range.lowerBound)
            let room = UnsafeMutableRawBufferPointer(
                rebasing: memory[place..<place + piece.range.count])
            if let block = piece.block {
                do {
                    let bytes = try await withTaskCancellationHandler {
                        try await block.value
                    } onCancel: {
                        block.cancel()
                    }
                    bytes.copy(piece.range, to: room)
                } catch let error as ImageError where error.isAboutPlace {
                    // The server may be able to read this part of the block.
                    try await file.read(piece.range, into: room)
                }
            } else {
                try await file.read(piece.range, into: room)
            }
        }
    }

    /// A part of a read, in a block or by a request of its own.
    private struct Piece {
        var range: Range<Int64>
        var block: Block?
    }

    private func plan(_ range: Range<Int64>, _ blocks: inout [Int64: Block]) -> [Piece] {
        var pieces: [Piece] = []
        var offset = range.lowerBound
        while offset < range.upperBound {
            let number = offset / Self.blockSize
            let part = offset..<min(range.upperBound, (number + 1) * Self.blockSize)
            offset = part.upperBound
            if blocks[number] == nil, range.count < Self.longRead,
                number == first || blocks[number - 1] != nil
            {
                // The first short read may be the only one.
                let last = number == first ? number : number + ahead
                for next in number...last { load(next, &blocks) }
            }
            if let block = use(number, &blocks) {
                pieces.append(Piece(range: part, block: block))
            } else if let last = pieces.last, last.block == nil {
                pieces[pieces.count - 1].range = last.range.lowerBound..<part.upperBound
            } else {
                pieces.append(Piece(range: part))
            }
        }
        return pieces
    }

    private func use(_ number: Int64, _ blocks: inout [Int64: Block]) -> Block? {
        guard let block = blocks[number] else { return nil }
        // The blocks behind the last one that is read ahead are fetched when this one is used.
        if blocks[number + 1] != nil {
            for next in number + 1...number + ahead { load(next, &blocks) }
        }
        return block
    }

    private var ahead: Int64 { file.isFar ? Self.ahead.far : Self.ahead.near }

    private func load(_ number: Int64, _ blocks: inout [Int64: Block]) {
        let end = min(file.version.size, (number + 1) * Self.blockSize)
        let begin = max(start, number * Self.blockSize)
        guard blocks[number] == nil, begin < end else { return }
        // Readers go forwards, so the first block is the least wanted.
        while blocks.count > Self.behind + Int(ahead), let first = blocks.keys.min() {
            blocks[first] = nil
        }
        // A block serves many readers, so it is no child of one; each of them cancels it.
        blocks[number] = Task(executorPreference: IOExecutor.shared) { [file, buffers] in
            let block = try BlockBytes(begin..<end, buffers)
            try await file.read(begin..<end, into: block.memory, isAhead: true)
            return block
        }
    }
}

/// The bytes of a block.
private final class BlockBytes: @unchecked Sendable {
    // Written before others see the object.
    let memory: UnsafeMutableRawBufferPointer
    private let range: Range<Int64>
    private var buffer: IOBuffer?
    private let buffers: IOBufferPool

    init(_ range: Range<Int64>, _ buffers: IOBufferPool) throws(ImageError) {
        self.range = range
        self.buffers = buffers
        var buffer = try buffers.take(byteCount: range.count)
        var all = buffer.mutableBytes
        // The memory stays where it is, and the object keeps it.
        memory = all.withUnsafeMutableBytes { $0 }
        self.buffer = consume buffer
    }

    deinit {
        if let buffer = buffer.take() { buffers.giveBack(buffer) }
    }

    func copy(_ part: Range<Int64>, to room: UnsafeMutableRawBufferPointer) {
        let place = Int(part.lowerBound - range.lowerBound)
        room.copyMemory(
            from: UnsafeRawBufferPointer(rebasing: memory[place..<place + part.count]))
    }
}
