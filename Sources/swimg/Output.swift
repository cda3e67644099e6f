import Glibc

/// Text to a person or a program, past stdio: at once, and whole.
enum Output {
    static func print(_ text: String) { write(text, to: STDOUT_FILENO) }
    static func printError(_ text: String) { write(text, to: STDERR_FILENO) }

    /// A reader that went away is no reason to fail.
    private static func write(_ text: String, to descriptor: Int32) {
        var text = text
        text.withUTF8 { bytes in
            var done = 0
            while done < bytes.count {
                let count = Glibc.write(
                    descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done)
                if count < 0 && errno != EINTR { return }
                done += max(0, count)
            }
        }
    }
}
