import DiskImage
import Glibc

/// Text to a person or a program, past stdio: at once, and whole.
enum Output {
    static func print(_ text: String) { write(text, to: STDOUT_FILENO) }
    static func printError(_ text: String) { write(text, to: STDERR_FILENO) }

    /// - Parameter text: in UTF-8.
    static func print(_ text: [UInt8]) {
        text.withUnsafeBufferPointer { _ = write($0, to: STDOUT_FILENO) }
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

    /// - Returns: whether it took everything. A reader that went away is no reason to fail.
    private static func write(_ bytes: UnsafeBufferPointer<UInt8>, to descriptor: Int32) -> Bool {
        var done = 0
        while done < bytes.count {
            let count = Glibc.write(
                descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done)
            if count < 0 && errno != EINTR { return false }
            done += max(0, count)
        }
        return true
    }
}
