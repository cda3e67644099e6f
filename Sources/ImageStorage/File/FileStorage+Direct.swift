import CLinux
import DiskImage
import Glibc

// O_DIRECT needs aligned offsets, lengths and memory. Callers need not align them.
//
// A page is written either directly or through the page cache, never both: the kernel drops the
// cached pages that a direct write covers, and a cached page that is only partly covered would
// bring stale neighbours back when it is written out. So direct writes are cut at page boundaries,
// and the unaligned ends go through a second, buffered descriptor.
extension FileStorage {
    private static let pageSize: Int64 = 4096

    /// - Returns: number of bytes read.
    func readDirect(
        into buffer: UnsafeMutableRawBufferPointer, at offset: Int64
    ) throws(ImageError) -> Int {
        let end = offset + Int64(buffer.count)
        if Self.isAligned(UnsafeRawBufferPointer(buffer), at: offset) {
            return try Syscall.read(
                descriptor, name, into: buffer, at: offset, mayBeCached: false,
                noting: readMeter.note)
        }
        let start = offset.roundedDown(to: Self.pageSize)
        var aligned = try IOBuffer(byteCount: Int(end.roundedUp(to: Self.pageSize) - start))
        var span = aligned.mutableBytes
        return try span.withUnsafeMutableBytes { bounce throws(ImageError) -> Int in
            let done = try Syscall.read(
                descriptor, name, into: bounce, at: start, mayBeCached: false,
                noting: readMeter.note)
            let skipped = Int(offset - start)
            let count = max(0, min(buffer.count, done - skipped))
            if count > 0 {
                buffer.copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: bounce[skipped..<skipped + count]))
            }
            return count
        }
    }

    func writeDirect(_ bytes: UnsafeRawBufferPointer, at offset: Int64) throws(ImageError) {
        let end = offset + Int64(bytes.count)
        let alignedStart = offset.roundedUp(to: Self.pageSize)
        let alignedEnd = end.roundedDown(to: Self.pageSize)
        guard alignedStart < alignedEnd else { return try writeBuffered(bytes, at: offset) }
        let head = Int(alignedStart - offset)
        let tail = Int(alignedEnd - offset)
        if head > 0 {
            try writeBuffered(UnsafeRawBufferPointer(rebasing: bytes[..<head]), at: offset)
        }
        try writeAligned(UnsafeRawBufferPointer(rebasing: bytes[head..<tail]), at: alignedStart)
        if tail < bytes.count {
            try writeBuffered(UnsafeRawBufferPointer(rebasing: bytes[tail...]), at: alignedEnd)
        }
    }

    /// Writes bytes with an aligned offset and length; the memory may not be aligned.
    private func writeAligned(
        _ bytes: UnsafeRawBufferPointer, at offset: Int64
    ) throws(ImageError) {
        if Self.isAligned(bytes, at: offset) {
            return try Syscall.write(
                descriptor, name, [bytes], at: offset, noting: writeMeter.note)
        }
        var aligned = try IOBuffer(byteCount: bytes.count)
        var span = aligned.mutableBytes
        try span.withUnsafeMutableBytes { bounce throws(ImageError) in
            bounce.copyMemory(from: bytes)
            try Syscall.write(
                descriptor, name, [UnsafeRawBufferPointer(bounce)], at: offset,
                noting: writeMeter.note)
        }
    }

    private func writeBuffered(
        _ bytes: UnsafeRawBufferPointer, at offset: Int64
    ) throws(ImageError) {
        try Syscall.write(try bufferedWriter(), name, [bytes], at: offset)
    }

    private func bufferedWriter() throws(ImageError) -> Int32 {
        try bufferedDescriptor.withLock { known throws(ImageError) -> Int32 in
            if let known { return known }
            // By descriptor, because a staged file has no name.
            let opened: Int32
            do throws(ImageError) {
                opened = try Syscall.open(
                    HostPath("/proc/self/fd/\(descriptor)"),
                    flags: O_WRONLY | cacheMode.bufferedOpenFlags)
            } catch {
                throw ImageError(
                    error.kind, path: name,
                    "cannot open it for the writes that O_DIRECT does not allow: \(error.message)")
            }
            known = opened
            return opened
        }
    }

    private static func isAligned(_ bytes: UnsafeRawBufferPointer, at offset: Int64) -> Bool {
        offset % pageSize == 0 && Int64(bytes.count) % pageSize == 0
            && Int(bitPattern: bytes.baseAddress) % IOBuffer.alignment == 0
    }
}
