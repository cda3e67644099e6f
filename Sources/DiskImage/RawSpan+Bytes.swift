// Slices and big-endian numbers in spans of bytes. Every access is bounds-checked.

extension MutableRawSpan {
    /// The bytes in `range` of this span, as a span to write through.
    @_lifetime(&self)
    @inlinable
    public mutating func slice(_ range: Range<Int>) -> MutableRawSpan {
        _mutatingExtracting(range)
    }

    @_lifetime(self: copy self)
    @inlinable
    public mutating func zeroFill(_ range: Range<Int>) {
        var part = slice(range)
        part.withUnsafeMutableBytes { _ = $0.initializeMemory(as: UInt8.self, repeating: 0) }
    }

    @_lifetime(self: copy self)
    @inlinable
    public mutating func zeroFill() { zeroFill(0..<byteCount) }
}

extension RawSpan {
    /// A big-endian number at a byte offset, the form of all numbers in qcow2.
    @inlinable
    public func bigEndian<T: FixedWidthInteger & BitwiseCopyable>(
        at offset: Int, as type: T.Type
    ) -> T {
        precondition(offset >= 0 && offset + MemoryLayout<T>.size <= byteCount)
        return T(bigEndian: unsafeLoadUnaligned(fromUncheckedByteOffset: offset, as: T.self))
    }
}

extension Array where Element == UInt8 {
    public mutating func appendBigEndian(_ number: some FixedWidthInteger) {
        Swift.withUnsafeBytes(of: number.bigEndian) { append(contentsOf: $0) }
    }
}
