import CLinux
import Glibc

/// The program's own pages, most of what a conversion had in memory: for a long one it pays to keep only those that it uses.
enum ProgramPages {
    /// A page, in bytes. Setting it up takes some 15 ms; with pieces of two half of that, and half a megabyte more.
    private static let piece = 4 << 10
    /// What is shorter is done in too short a time for that, in bytes.
    private static let longToCompress: Int64 = 256 << 20
    private static let longToRead: Int64 = 1 << 30

    /// To be called before the command line is parsed, which touches more of the program than all that follows.
    ///
    /// Compressing and decompressing need memory, and take long. A raw image has only to be copied: that needs little
    /// and is soon over.
    ///
    /// - Parameter words: the command line, letters apart.
    static func prepare(for words: [String]) {
        guard words.first == "convert" else { return }
        let compresses = words.contains("-c")
        let isLong = words.contains { word in
            let size = allocatedSize(word)
            return compresses && size >= longToCompress || size >= longToRead && isQcow2(word)
        }
        guard isLong else { return }
        clinux_divide_program_mappings(piece)
        release()
    }

    /// Unmaps what has been read of the program so far.
    static func release() { clinux_release_program_pages() }

    /// In bytes; 0 for what is no regular file.
    private static func allocatedSize(_ path: String) -> Int64 {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return 0 }
        return Int64(status.st_blocks) * 512
    }

    /// As far as its first bytes tell.
    private static func isQcow2(_ path: String) -> Bool {
        let file = open(path, O_RDONLY)
        guard file >= 0 else { return false }
        defer { close(file) }
        var magic: UInt32 = 0
        return pread(file, &magic, 4, 0) == 4 && UInt32(bigEndian: magic) == 0x5146_49fb
    }
}
