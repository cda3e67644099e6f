import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// Unbuffered output to standard output and standard error, without stdio.
///
/// `print` writes the text that the user asked for. If such a write fails, `Output` remembers the
/// error instead of throwing, so that the work still completes; `Main.leave` then makes the program
/// fail.
enum Output {
    private static let firstError = Atomic<Int32>(0)

    /// The errno of the first failed write to standard output; nil if all succeeded.
    static var failure: Int32? {
        let error = firstError.load(ordering: .relaxed)
        return error == 0 ? nil : error
    }

    static func print(_ text: String) {
        var text = text
        text.withUTF8 { printBytes($0) }
    }

    /// - Parameter text: UTF-8.
    static func print(_ text: [UInt8]) { text.withUnsafeBufferPointer { printBytes($0) } }

    /// Shows progress on standard output. A failed write is ignored: the command can succeed
    /// without it.
    static func show(_ text: String) { write(text, to: STDOUT_FILENO) }

    static func printError(_ text: String) { write(text, to: STDERR_FILENO) }

    /// Stops a long listing early when its output can no longer be written.
    ///
    /// - Throws: `OutputFailure` after a failed write.
    static func checkReader() throws {
        if failure != nil { throw OutputFailure() }
    }

    private static func printBytes(_ bytes: UnsafeBufferPointer<UInt8>) {
        // Text after a missing part would mislead, so nothing follows a failed write.
        guard failure == nil, !write(bytes, to: STDOUT_FILENO) else { return }
        firstError.store(errno, ordering: .relaxed)
    }

    /// Creates a file with this text, or replaces the content of an existing file.
    static func write(_ text: String, toFile path: HostPath) throws(ImageError) {
        let descriptor = path.withCString { creat($0, 0o666) }
        var text = text
        guard descriptor >= 0, text.withUTF8({ write($0, to: descriptor) }),
            close(descriptor) == 0
        else {
            throw Syscall.failure(path.description, "cannot write")
        }
    }

    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        _ = text.withUTF8 { write($0, to: descriptor) }
    }

    /// - Returns: whether all bytes were written; if not, `errno` tells the reason.
    private static func write(_ bytes: UnsafeBufferPointer<UInt8>, to descriptor: Int32) -> Bool {
        var done = 0
        while done < bytes.count {
            let count = Glibc.write(
                descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done)
            if count < 0, errno == EAGAIN {
                // Another process has made the descriptor non-blocking.
                var polled = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
                poll(&polled, 1, -1)
            } else if count < 0, errno != EINTR {
                return false
            }
            done += max(0, count)
        }
        return true
    }
}

/// A failed write to standard output; `Output.failure` has its errno.
struct OutputFailure: Error {}
