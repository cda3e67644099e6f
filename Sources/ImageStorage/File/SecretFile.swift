import DiskImage
import Glibc

/// A file that holds a passphrase, or a pipe that brings one (`/dev/fd/3`).
public enum SecretFile {
    /// Limit in bytes; a longer file is surely another one.
    private static let longest = 64 << 10

    /// Reads all of the file.
    public static func read(_ path: HostPath) throws(ImageError) -> SecretBytes {
        let descriptor = try Syscall.open(path, flags: O_RDONLY)
        defer { close(descriptor) }
        var buffer = try IOBuffer(byteCount: longest + 1)
        defer { buffer.wipe() }
        var count = 0
        var span = buffer.mutableBytes
        while count <= longest {
            var rest = span.slice(count..<longest + 1)
            let read = rest.withUnsafeMutableBytes { rest in
                Syscall.retry { Glibc.read(descriptor, rest.baseAddress, rest.count) }
            }
            guard let read else { throw Syscall.failure(path.description, "cannot read") }
            if read == 0 { break }
            count += read
        }
        guard count <= longest else {
            throw ImageError(
                .invalid, path: path.description, "is too long for a secret (64 KiB at most)")
        }
        return buffer.bytes.extracting(0..<count).withUnsafeBytes { bytes in
            SecretBytes(count: count) { $0.copyMemory(from: bytes) }
        }
    }
}
