import DiskImage
import Glibc
import Synchronization

/// Text to a person or a program, past stdio: at once, and whole.
///
/// A command is asked for the text that it prints to standard output. A write that fails there is
/// remembered instead of thrown, so that the work still gets done, and fails the program at its end
/// (`Main.leave`).
enum Output {
    private static let firstError = Atomic<Int32>(0)

    /// The errno of the first write to standard output that failed; nil if none did.
    static var failure: Int32? {
        let error = firstError.load(ordering: .relaxed)
        return error == 0 ? nil : error
    }

    static func print(_ text: String) {
        var text = text
        text.withUTF8 { printBytes($0) }
    }

    /// - Parameter text: in UTF-8.
    static func print(_ text: [UInt8]) { text.withUnsafeBufferPointer { printBytes($0) } }

    /// Shows progress on standard output. No command fails for want of it.
    static func show(_ text: String) { write(text, to: STDOUT_FILENO) }

    static func printError(_ text: String) { write(text, to: STDERR_FILENO) }

    /// Ends a long listing that is not read any more.
    ///
    /// - Throws: `OutputFailure` after a write that failed.
    static func checkReader() throws {
        if failure != nil { throw OutputFailure() }
    }

    private static func printBytes(_ bytes: UnsafeBufferPointer<UInt8>) {
        // Text behind a part that is missing would only mislead.
        guard failure == nil, !write(bytes, to: STDOUT_FILENO) else { return }
        firstError.store(errno, ordering: .relaxed)
    }

    /// Makes a file of a text, or replaces what it held.
    static func write(_ text: String, toFile path: HostPath) throws(ImageError) {
        let descriptor = path.withCString { creat($0, 0o666) }
        var text = text
        guard descriptor >= 0, text.withUTF8({ write($0, to: descriptor) }),
            close(descriptor) == 0
        else {
            let code = errno
            throw ImageError(
                .system(errno: code), path: path.description,
                "cannot write: \(String(cString: strerror(code)))")
        }
    }

    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        _ = text.withUTF8 { write($0, to: descriptor) }
    }

    /// - Returns: whether it took everything; `errno` says why not.
    private static func write(_ bytes: UnsafeBufferPointer<UInt8>, to descriptor: Int32) -> Bool {
        var done = 0
        while done < bytes.count {
            let count = Glibc.write(
                descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done)
            if count < 0, errno == EAGAIN {
                // A descriptor that another process made non-blocking.
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

/// The reader of standard output went away, or cannot be written to: `Output.failure` says why.
struct OutputFailure: Error {}
