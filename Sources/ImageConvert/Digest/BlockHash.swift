import DiskImage

/// A way to make one hash of the hashes of blocks.
struct BlockHashForm: Sendable, Equatable {
    /// Length of a block in bytes; the last one may be shorter.
    let blockSize: Int64
    /// Whether the length of the disk is hashed behind the last block's hash.
    let hashesLength: Bool

    /// The form of `blksum` and `nbdcopy --blkhash`.
    static let blkhash = BlockHashForm(blockSize: 64 << 10, hashesLength: true)
    /// The form of `WritableStorage.checksum`. A block is as long as a chunk, so that blocks are
    /// hashed in parallel; shorter ones cost the server more reads.
    static let checksum = BlockHashForm(blockSize: 2 << 20, hashesLength: false)
}

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

    mutating func appendZeros(_ blocks: Int64, of blockSize: Int64) {
        guard blocks > 0 else { return }
        length += blocks * blockSize
        if case .zeros(let count)? = runs.last {
            runs[runs.count - 1] = .zeros(count: count + blocks)
        } else {
            runs.append(.zeros(count: blocks))
        }
    }
}

/// Hashes the blocks of a part of a disk that starts at a block boundary.
struct BlockHasher: ~Copyable, ByteSink {
    /// Length of a block in bytes.
    private let blockSize: Int64
    /// The hashes of the finished blocks that have not been taken.
    private var hashes = BlockHashes()
    private var inner: SHA256
    /// Number of bytes in the current, unfinished block.
    private var filled: Int64 = 0
    /// The current block is all zeros so far, and `inner` has not received them.
    private var isZero = true

    init(_ form: BlockHashForm) throws(ImageError) {
        blockSize = form.blockSize
        inner = try SHA256()
    }

    mutating func add(_ bytes: RawSpan) throws(ImageError) {
        var position = 0
        while position < bytes.byteCount {
            let count = min(Int(blockSize - filled), bytes.byteCount - position)
            let part = bytes.extracting(position..<position + count)
            position += count
            if count == Int(blockSize), ZeroScan.isZero(part) {
                hashes.appendZeros(1, of: blockSize)
                continue
            }
            if isZero { try inner.addZeros(filled) }
            isZero = false
            try inner.add(part)
            filled += Int64(count)
            if filled == blockSize { try closeBlock() }
        }
    }

    mutating func addZeros(_ count: Int64) throws(ImageError) {
        var rest = count
        if filled > 0 {
            let part = min(rest, blockSize - filled)
            if !isZero { try inner.addZeros(part) }
            filled += part
            rest -= part
            if filled == blockSize { try closeBlock() }
        }
        hashes.appendZeros(rest / blockSize, of: blockSize)
        filled += rest % blockSize
    }

    private mutating func closeBlock() throws(ImageError) {
        if isZero, filled == blockSize {
            hashes.appendZeros(1, of: blockSize)
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

/// The block hash of a disk: a hash over its blocks' hashes, and in some forms over its length.
struct BlockHash: ~Copyable, ByteSink {
    /// Number of zero-block hashes that are added in one call.
    private static let zerosAtOnce: Int64 = 2048

    private var outer: SHA256
    private var length: Int64 = 0
    /// Cuts the byte stream into blocks.
    private var cutter: BlockHasher
    private let zeros: [UInt8]
    private let hashesLength: Bool

    /// - Throws: `ImageError` if libcrypto is missing or fails.
    static func make(_ form: BlockHashForm) throws(ImageError) -> BlockHash {
        var hash = try SHA256()
        try hash.addZeros(form.blockSize)
        let zero = try hash.finish()
        return BlockHash(form, outer: hash, cutter: try BlockHasher(form), zero: zero)
    }

    private init(
        _ form: BlockHashForm, outer: consuming SHA256, cutter: consuming BlockHasher, zero: [UInt8]
    ) {
        self.outer = outer
        self.cutter = cutter
        hashesLength = form.hashesLength
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
        if hashesLength {
            let end = withUnsafeBytes(of: length.littleEndian) { Array($0) }
            try outer.add(end.span.bytes)
        }
        return try outer.finish()
    }
}
