import Glibc

/// Page-aligned memory for I/O, owned by one task at a time.
///
/// Pages that are never touched cost no memory, so a buffer may be allocated for the worst case.
public struct IOBuffer: ~Copyable, @unchecked Sendable {
    /// Alignment in bytes, enough for O_DIRECT on every device with sectors of up to 4 KiB.
    public static let alignment = 4096

    /// Size of a huge page in bytes. The first touch of one takes a tenth of the time of the first
    /// touches of the small pages it replaces.
    private static let hugePage = 2 << 20

    /// Length in bytes from which a buffer has to leave the margin of memory alone. Most such
    /// buffers are kept for many uses; for compressed runs and reads past the page cache that are
    /// not aligned, the look at the memory comes with each, and is short beside their I/O.
    private static let long = 128 << 10

    private let memory: UnsafeMutableRawBufferPointer

    /// - Parameter byteCount: length in bytes; 0 is allowed.
    /// - Throws: `ImageError` if there is not enough memory.
    public init(byteCount: Int) throws(ImageError) {
        let start: UnsafeMutableRawPointer?
        let isHuge = byteCount >= Self.hugePage
        let alignment = isHuge ? Self.hugePage : Self.alignment
        start =
            byteCount < Self.long
            ? try Self.allocate(byteCount, alignment)
            : try MemoryMargin.take(byteCount + alignment) { () throws(ImageError) in
                try Self.allocate(byteCount, alignment)
            }
        // madvise only advises: without huge pages, the buffer gets small ones.
        if isHuge { _ = madvise(start, byteCount.roundedDown(to: Self.hugePage), MADV_HUGEPAGE) }
        memory = UnsafeMutableRawBufferPointer(start: start, count: byteCount)
    }

    private static func allocate(
        _ byteCount: Int, _ alignment: Int
    ) throws(ImageError) -> UnsafeMutableRawPointer? {
        var start: UnsafeMutableRawPointer?
        guard posix_memalign(&start, alignment, byteCount) == 0 else {
            throw .outOfMemory(byteCount)
        }
        return start
    }

    deinit { free(memory.baseAddress) }

    public var byteCount: Int { memory.count }

    /// Overwrites the bytes with zeros, even if they are never read again.
    public mutating func wipe() { memory.wipe() }

    /// The whole buffer, for reading.
    public var bytes: RawSpan {
        @_lifetime(borrow self)
        borrowing get {
            let span = memory.bytes
            return _overrideLifetime(span, borrowing: self)
        }
    }

    /// The whole buffer, for writing.
    public var mutableBytes: MutableRawSpan {
        @_lifetime(&self)
        mutating get {
            let span = memory.mutableBytes
            return _overrideLifetime(span, mutating: &self)
        }
    }
}

extension IOBuffer {
    public static func zeros(byteCount: Int) throws(ImageError) -> IOBuffer {
        var buffer = try IOBuffer(byteCount: byteCount)
        var bytes = buffer.mutableBytes
        bytes.withUnsafeMutableBytes { _ = $0.initializeMemory(as: UInt8.self, repeating: 0) }
        return buffer
    }
}

extension ImageError {
    /// - Parameter byteCount: number of bytes requested; nil if a library does not report it.
    public static func outOfMemory(_ byteCount: Int? = nil) -> ImageError {
        ImageError(
            .system(errno: ENOMEM),
            "cannot get \(byteCount.map { "\($0) bytes of " } ?? "")memory: "
                + String(cString: strerror(ENOMEM)))
    }
}
