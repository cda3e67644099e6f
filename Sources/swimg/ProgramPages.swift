import CLinux
import Glibc
import ImageFormats

/// The program's own pages, most of what a conversion had in memory: for a long one it pays to keep only those that it uses.
enum ProgramPages {
    /// A page, in bytes. A process takes 16 ms longer with it; with pieces of two half of that, and half a megabyte more.
    private static let piece = 4 << 10
    /// What is shorter is done in too short a time for that, in bytes.
    private static let longToCompress: Int64 = 256 << 20
    private static let longToRead: Int64 = 1 << 30

    /// To be called before all else. What looks at the command line for good touches more of the program than what
    /// follows, and so does working with Swift's strings: words are looked at by C's functions.
    ///
    /// Compressing and decompressing need memory, and take long. A raw image has only to be copied: that needs little
    /// and is soon over.
    static func prepare() {
        let words = UnsafeBufferPointer(
            start: CommandLine.unsafeArgv, count: Int(CommandLine.argc))
        guard words.count > 1, let verb = words[1], strcmp(verb, "convert") == 0 else { return }
        var compresses = false
        for case let word? in words where isCompressing(word) { compresses = true }
        for case let word? in words {
            let size = allocatedSize(word)
            guard compresses && size >= longToCompress || size >= longToRead && isQcow2(word) else {
                continue
            }
            clinux_divide_program_mappings(piece)
            return release()
        }
    }

    /// Whether there is a `-c` in it, by itself or with other letters that need nothing behind them.
    private static func isCompressing(_ word: UnsafePointer<CChar>) -> Bool {
        guard word[0] == 0x2d else { return false }
        let flags = strspn(word + 1, ConvertCommand.flags)
        return memchr(word + 1, 0x63, flags) != nil
    }

    /// Unmaps what has been read of the program so far.
    static func release() { clinux_release_program_pages() }

    /// In bytes; 0 for what is no regular file.
    private static func allocatedSize(_ path: UnsafePointer<CChar>) -> Int64 {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return 0 }
        return Int64(status.st_blocks) * 512
    }

    /// As far as its first bytes tell.
    private static func isQcow2(_ path: UnsafePointer<CChar>) -> Bool {
        let file = open(path, O_RDONLY)
        guard file >= 0 else { return false }
        defer { close(file) }
        var magic: UInt32 = 0
        return pread(file, &magic, 4, 0) == 4 && UInt32(bigEndian: magic) == Qcow2Header.magic
    }
}
