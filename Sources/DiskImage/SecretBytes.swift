import Glibc

/// Bytes that must not stay in memory: a passphrase or a key. They are wiped when the last
/// reference to them goes.
public final class SecretBytes: @unchecked Sendable {
    private let memory: UnsafeMutableRawBufferPointer

    /// Makes a secret and lets `fill` write it; `memory` holds zeros before.
    public init<Failure: Error>(
        count: Int, _ fill: (_ memory: UnsafeMutableRawBufferPointer) throws(Failure) -> Void
    ) throws(Failure) {
        memory = .allocate(byteCount: count, alignment: MemoryLayout<UInt64>.alignment)
        _ = memory.initializeMemory(as: UInt8.self, repeating: 0)
        try fill(memory)
    }

    /// Copies bytes, which the caller has to wipe if it can.
    public convenience init(_ bytes: [UInt8]) {
        self.init(count: bytes.count) { $0.copyBytes(from: bytes) }
    }

    deinit {
        memory.wipe()
        memory.deallocate()
    }

    public var count: Int { memory.count }

    /// Calls `body` with the bytes, which it must not keep.
    public func withBytes<Result, Failure: Error>(
        _ body: (UnsafeRawBufferPointer) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        try body(UnsafeRawBufferPointer(memory))
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Overwrites the bytes with zeros, even if they are never read again.
    package func wipe() {
        if let baseAddress { explicit_bzero(baseAddress, count) }
    }
}
