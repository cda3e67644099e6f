import CLinux
import DiskImage
import Glibc

/// A second way into a file, past the page cache, and whether to take it.
///
/// Only long writes of whole pages take it, so that none is written on both ways at once; the kernel drops what the page cache
/// holds of them.
struct PageCacheBypass: ~Copyable {
    /// What is shorter is faster through the page cache, in bytes.
    private static let shortest = 64 << 10

    private let file: Int32
    private var opened: Int32?
    private var queue: UInt?
    private var chooser: WritePathChooser

    /// - Parameter file: open for as long as this is asked.
    init(_ file: Int32, chooser: WritePathChooser = WritePathChooser()) {
        self.file = file
        self.chooser = chooser
    }

    deinit {
        if let queue { clinux_close_queue(queue) }
        if let opened { _ = Glibc.close(opened) }
    }

    /// Whether a regular file is on a file system to try it with: one that has blocks on a device of its own and writes
    /// directly without a detour.
    static func isPossible(_ file: Int32) -> Bool {
        // linux/magic.h: ext2 to ext4, XFS.
        [0xef53, 0x5846_5342].contains(clinux_file_system(file))
    }

    /// What O_DIRECT wants of offset, length and memory.
    static func isFit(_ pieces: [UnsafeRawBufferPointer], at offset: Int64) -> Bool {
        let page = IOBuffer.alignment
        return offset % Int64(page) == 0 && pieces.reduce(0) { $0 + $1.count } >= shortest
            && pieces.allSatisfy {
                $0.count % page == 0 && Int(bitPattern: $0.baseAddress) % page == 0
            }
    }

    /// What to write to directly now; nil if the page cache is the way to go.
    var descriptor: Int32? {
        mutating get {
            guard chooser.isDirect else { return nil }
            if opened == nil {
                // By descriptor, not by name: a staged file has none.
                opened = try? Syscall.open(
                    HostPath("/proc/self/fd/\(file)"), flags: O_WRONLY | clinux_O_DIRECT)
                if opened == nil {
                    giveUp()
                } else {
                    var queue: UInt = 0
                    if clinux_open_queue(&queue) == 0 { self.queue = queue }
                }
            }
            return opened
        }
    }

    /// What to write to directly, and what the kernel needs to make several writes together; nil if the page cache is
    /// the way to go, or the kernel has none.
    var together: (descriptor: Int32, queue: UInt)? {
        mutating get {
            guard let descriptor, let queue else { return nil }
            return (descriptor, queue)
        }
    }

    mutating func giveUp() { chooser.settleForCache() }

    /// Several writes together are refused here.
    mutating func giveUpTogether() {
        if let queue { clinux_close_queue(queue) }
        queue = nil
    }

    mutating func note(bytes: Int, time: Duration) {
        chooser.note(bytes: bytes, time: Int64(time / .nanoseconds(1)))
    }
}
