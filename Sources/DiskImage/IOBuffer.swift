/// Page-aligned memory for I/O, owned by one task at a time.
///
/// Pages that are never touched cost no memory, so a buffer may be allocated for the worst case.
public struct IOBuffer: ~Copyable, @unchecked Sendable {
    /// Enough for O_DIRECT on every device with sectors of up to 4 KiB.
    public static let alignment = 4096

    private let memory: UnsafeMutableRawBufferPointer

    /// - Parameter byteCount: in bytes, 0 allowed.
    public init(byteCount: Int) {
        memory = .allocate(byteCount: byteCount, alignment: Self.alignment)
    }

    deinit { memory.deallocate() }

    public var byteCount: Int { memory.count }

    /// All of it, to read.
    public var bytes: RawSpan {
        @_lifetime(borrow self)
        borrowing get {
            let span = memory.bytes
            return _overrideLifetime(span, borrowing: self)
        }
    }

    /// All of it, to write.
    public var mutableBytes: MutableRawSpan {
        @_lifetime(&self)
        mutating get {
            let span = memory.mutableBytes
            return _overrideLifetime(span, mutating: &self)
        }
    }
}

extension IOBuffer {
    public static func zeros(byteCount: Int) -> IOBuffer {
        var buffer = IOBuffer(byteCount: byteCount)
        var bytes = buffer.mutableBytes
        bytes.withUnsafeMutableBytes { _ = $0.initializeMemory(as: UInt8.self, repeating: 0) }
        return buffer
    }
}
