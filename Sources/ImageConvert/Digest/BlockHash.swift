import DiskImage

/// The hashes of consecutive blocks.
struct BlockHashes: Sendable, Equatable {
    enum Run: Sendable, Equatable {
        /// Whole blocks of zeros, whose common hash is known.
        case zeros(count: Int64)
        /// The concatenated hashes of other blocks.
        case hashes([UInt8])
    }

    private(set) var runs: [Run] = []
    /// Total length of the blocks in bytes.
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

/// Hashes the blocks of a part of a disk that starts at a block boundary.
struct BlockHasher: ~Copyable, ByteSink {
    /// Size of a block in bytes.
    static let blockSize: Int64 = 64 << 10

    /// The hashes of the finished blocks that have not been taken.
    private var hashes = BlockHashes()
    private var inner: SHA256
    /// Number of bytes in the current, unfinished block.
    private var filled: Int64 = 0
    /// The current block is all zeros so far, and `inner` has not received them.
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
            if isZero { try inner.addZeros(filled) }
            isZero = false
            try inner.add(part)
            filled += Int64(count)
            if filled == Self.blockSize { try closeBlock() }
        }
    }

    mutating func addZeros(_ count: Int64) throws(ImageError) {
        var rest = count
        if filled > 0 {
            let part = min(rest, Self.blockSize - filled)
            if !isZero { try inner.addZeros(part) }
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
            if isZero { try inner.addZeros(filled) }
            hashes.append(try inner.finish(), of: Int(filled))
        }
        filled = 0
        isZero = true
    }

    /// Hashes the last block, which may be shorter than the others.
    mutating func finish() throws(ImageError) { if filled > 0 { try closeBlock() } }

    /// Takes the hashes of the finished blocks, leaving none.
    mutating func takeHashes() -> BlockHashes {
        defer { hashes = BlockHashes() }
        return hashes
    }
}

/// The block hash of a disk: a hash over its blocks' hashes and its length.
struct BlockHash: ~Copyable, ByteSink {
    /// Number of zero-block hashes that are added in one call.
    private static let zerosAtOnce: Int64 = 2048

    private var outer: SHA256
    private var length: Int64 = 0
    /// Cuts the byte stream into blocks.
    private var cutter: BlockHasher
    private let zeros: [UInt8]

    /// - Throws: `ImageError` if libcrypto is missing or fails.
    static func make() throws(ImageError) -> BlockHash {
        var hash = try SHA256()
        try hash.addZeros(BlockHasher.blockSize)
        let zero = try hash.finish()
        return BlockHash(outer: hash, cutter: try BlockHasher(), zero: zero)
    }

    private init(outer: consuming SHA256, cutter: consuming BlockHasher, zero: [UInt8]) {
        self.outer = outer
        self.cutter = cutter
        zeros = Array(repeatElement(zero, count: Int(Self.zerosAtOnce)).joined())
    }

    mutating func add(_ bytes: RawSpan) throws {
        try cutter.add(bytes)
        try append(cutter.takeHashes())
    }

    mutating func addZeros(_ count: Int64) throws {
        try cutter.addZeros(count)
        try append(cutter.takeHashes())
    }

    /// Adds blocks that were hashed elsewhere. Valid only at a block boundary.
    ///
    /// - Throws: `ImageError`, or `CancellationError`.
    mutating func append(_ hashes: BlockHashes) throws {
        length += hashes.length
        for run in hashes.runs {
            switch run {
            case .hashes(let list): try outer.add(list.span.bytes)
            case .zeros(let count): try appendZeros(count)
            }
        }
    }

    private mutating func appendZeros(_ blocks: Int64) throws {
        let zeros = zeros
        let hash = Int64(zeros.count) / Self.zerosAtOnce
        var rest = blocks
        while rest > 0 {
            // A header can claim a huge disk, so the loop must be cancellable.
            try Task.checkCancellation()
            let part = min(rest, Self.zerosAtOnce)
            try outer.add(zeros.span.bytes.extracting(0..<Int(part * hash)))
            rest -= part
        }
    }

    /// The 32 bytes of the hash. Must be the last call.
    mutating func finish() throws -> [UInt8] {
        try cutter.finish()
        try append(cutter.takeHashes())
        let end = withUnsafeBytes(of: length.littleEndian) { Array($0) }
        try outer.add(end.span.bytes)
        return try outer.finish()
    }
}
