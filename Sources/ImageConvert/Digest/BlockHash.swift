import DiskImage

/// The hashes of some neighbouring blocks.
struct BlockHashes: Sendable, Equatable {
    enum Run: Sendable, Equatable {
        /// Whole blocks of zeros, whose hash is known.
        case zeros(count: Int64)
        /// The hashes of other blocks, one behind the other.
        case hashes([UInt8])
    }

    private(set) var runs: [Run] = []
    /// The sum of all blocks, in bytes.
    private(set) var length: Int64 = 0

    mutating func append(_ hash: [UInt8], of byteCount: Int) {
        length += Int64(byteCount)
        if case .hashes(let list)? = runs.last {
            runs[runs.count - 1] = .hashes(list + hash)
        } else {
            runs.append(.hashes(hash))
        }
    }

    mutating func appendZeros(_ blocks: Int64) {
        guard blocks > 0 else { return }
        length += blocks * BlockHasher.blockSize
        if case .zeros(let count)? = runs.last {
            runs[runs.count - 1] = .zeros(count: count + blocks)
        } else {
            runs.append(.zeros(count: blocks))
        }
    }
}

/// Hashes the blocks of a part of a disk.
struct BlockHasher: ~Copyable, DiskHash {
    /// In bytes.
    static let blockSize: Int64 = 64 << 10

    /// Those of the blocks that are whole, and have not been taken.
    private var hashes = BlockHashes()
    private var inner: SHA256
    /// How much of a block has been begun, in bytes.
    private var filled: Int64 = 0
    /// All of that is zeros, and `inner` has not seen them.
    private var isZero = true

    init() throws(ImageError) { inner = try SHA256() }

    mutating func add(_ bytes: RawSpan) throws(ImageError) {
        var position = 0
        while position < bytes.byteCount {
            let count = min(Int(Self.blockSize - filled), bytes.byteCount - position)
            let part = bytes.extracting(position..<position + count)
            position += count
            if count == Int(Self.blockSize), ZeroScan.isZero(part) {
                hashes.appendZeros(1)
                continue
            }
            if isZero { try inner.updateZeros(filled) }
            isZero = false
            try inner.update(part)
            filled += Int64(count)
            if filled == Self.blockSize { try closeBlock() }
        }
    }

    mutating func addZeros(_ count: Int64) throws(ImageError) {
        var rest = count
        if filled > 0 {
            let part = min(rest, Self.blockSize - filled)
            if !isZero { try inner.updateZeros(part) }
            filled += part
            rest -= part
            if filled == Self.blockSize { try closeBlock() }
        }
        hashes.appendZeros(rest / Self.blockSize)
        filled += rest % Self.blockSize
    }

    private mutating func closeBlock() throws(ImageError) {
        if isZero, filled == Self.blockSize {
            hashes.appendZeros(1)
        } else {
            if isZero { try inner.updateZeros(filled) }
            hashes.append(try inner.finish(), of: Int(filled))
        }
        filled = 0
        isZero = true
    }

    /// The last block is as short as it is.
    mutating func finish() throws(ImageError) { if filled > 0 { try closeBlock() } }

    /// The hashes of all whole blocks that have not been taken.
    mutating func takeHashes() -> BlockHashes {
        defer { hashes = BlockHashes() }
        return hashes
    }
}

/// The hash of a disk: of its blocks' hashes and its length.
struct BlockHash: ~Copyable {
    /// How many hashes of zeros are added at once.
    private static let zerosAtOnce = 2048

    private var outer: SHA256
    private var length: Int64 = 0
    private let zeros: [UInt8]

    init() throws(ImageError) {
        var hash = try SHA256()
        try hash.updateZeros(BlockHasher.blockSize)
        let zero = try hash.finish()
        zeros = Array(repeatElement(zero, count: Self.zerosAtOnce).joined())
        outer = hash
    }

    /// - Throws: `ImageError`, or `CancellationError`.
    mutating func append(_ hashes: BlockHashes) throws {
        length += hashes.length
        for run in hashes.runs {
            switch run {
            case .hashes(let list): try outer.update(list.span.bytes)
            case .zeros(let count): try appendZeros(count)
            }
        }
    }

    private mutating func appendZeros(_ count: Int64) throws {
        let zeros = zeros
        let length = Int64(zeros.count / Self.zerosAtOnce)
        var rest = count
        while rest > 0 {
            try Task.checkCancellation()
            let part = min(rest, Int64(Self.zerosAtOnce))
            try outer.update(zeros.span.bytes.extracting(0..<Int(part * length)))
            rest -= part
        }
    }

    /// The end: 32 bytes.
    mutating func finish() throws(ImageError) -> [UInt8] {
        let end = withUnsafeBytes(of: length.littleEndian) { Array($0) }
        try outer.update(end.span.bytes)
        return try outer.finish()
    }
}
