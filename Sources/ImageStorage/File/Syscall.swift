import CLinux
import Concurrency
import DiskImage
import Glibc

/// System calls for Swift: a negative result becomes an `ImageError` that names file, operation and
/// reason, an interrupted call is repeated, and a short one continued. Only this file words them.
package enum Syscall {
    /// Repeats a call as long as a signal interrupts it.
    ///
    /// - Returns: the result of the call; nil with `errno` set if it is negative.
    @inline(__always)
    static func retry<T: FixedWidthInteger & SignedInteger>(_ call: () -> T) -> T? {
        while true {
            let result = IOExecutor.mayBlock(call)
            if result >= 0 { return result }
            if errno != EINTR { return nil }
        }
    }

    /// Makes a call that moves data or makes zeros, and measures it.
    ///
    /// - Parameter note: receives the times of each call.
    @inline(__always)
    static func retry<T: FixedWidthInteger & SignedInteger>(
        noting note: (CallTimes) -> Void, _ call: () -> T
    ) -> T? {
        retry {
            let (result, times) = CallTimes.measure(call)
            note(times)
            return result
        }
    }

    /// The error for a call that failed, with the system's text.
    package static func failure(
        _ path: String?, _ operation: String, errno code: Int32 = errno
    ) -> ImageError {
        ImageError(
            .system(errno: code), path: path, "\(operation): \(String(cString: strerror(code)))")
    }

    static func open(
        _ path: HostPath, flags: Int32, mode: UInt32 = 0
    ) throws(ImageError) -> Int32 {
        let descriptor = path.withCString { path in
            retry { Glibc.open(path, flags | O_CLOEXEC, mode) }
        }
        guard let descriptor else { throw failure(path.description, "cannot open") }
        return descriptor
    }

    static func status(_ descriptor: Int32, _ path: String) throws(ImageError) -> stat {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else {
            throw failure(path, "cannot read its size and type")
        }
        return status
    }

    /// Reads until the buffer is full or the file ends.
    ///
    /// - Parameters:
    ///   - mayBeCached: whether to read first what comes without sleeping.
    ///   - note: receives the times of each call.
    /// - Returns: number of bytes read.
    static func read(
        _ descriptor: Int32, _ path: String, into buffer: UnsafeMutableRawBufferPointer,
        at offset: Int64, mayBeCached: Bool = true, noting note: (CallTimes) -> Void = { _ in }
    ) throws(ImageError) -> Int {
        var done = 0
        if mayBeCached {
            let (count, times) = CallTimes.measure {
                clinux_read_cached(descriptor, buffer.baseAddress, buffer.count, offset)
            }
            done = max(0, count)
            if done > 0 { note(times) }
        }
        while done < buffer.count {
            let count = retry(noting: note) {
                pread(
                    descriptor, buffer.baseAddress.map { $0 + done }, buffer.count - done,
                    off_t(offset) + done)
            }
            guard let count else {
                throw failure(
                    path,
                    "cannot read \(buffer.count - done) bytes at offset \(offset + Int64(done))"
                )
            }
            if count == 0 { break }
            done += count
        }
        return done
    }

    /// Writes several pieces of memory one after the other at one offset.
    ///
    /// - Parameters:
    ///   - pieces: at most 1024, the kernel's limit.
    ///   - note: receives the times of each call.
    static func write(
        _ descriptor: Int32, _ path: String, _ pieces: [UnsafeRawBufferPointer], at offset: Int64,
        noting note: (CallTimes) -> Void = { _ in }
    ) throws(ImageError) {
        var rest = iovecs(pieces)
        var position = offset
        while !rest.isEmpty {
            let count = retry(noting: note) {
                pwritev(descriptor, rest, Int32(rest.count), off_t(position))
            }
            guard let count, count > 0 else {
                let length = rest.reduce(0) { $0 + $1.iov_len }
                throw failure(
                    path, "cannot write \(length) bytes at offset \(position)",
                    errno: count == 0 ? ENOSPC : errno)
            }
            position += Int64(count)
            drop(count, from: &rest)
        }
    }

    private static func iovecs(_ pieces: [UnsafeRawBufferPointer]) -> [iovec] {
        pieces.filter { !$0.isEmpty }.map {
            iovec(iov_base: UnsafeMutableRawPointer(mutating: $0.baseAddress), iov_len: $0.count)
        }
    }

    /// Removes written bytes from the front.
    private static func drop(_ count: Int, from rest: inout [iovec]) {
        var count = count
        while let first = rest.first, count >= first.iov_len {
            count -= first.iov_len
            rest.removeFirst()
        }
        guard count > 0 else { return }
        rest[0].iov_base += count
        rest[0].iov_len -= count
    }
}
