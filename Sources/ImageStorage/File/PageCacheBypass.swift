import CLinux
import DiskImage
import Glibc

/// A second descriptor of a file, which bypasses the page cache, and the choice when to use it.
///
/// Only long writes of whole pages use it, so that no page is written both ways at once. The kernel
/// drops the pages that the page cache holds of such a write.
struct PageCacheBypass: ~Copyable {
    /// Shortest direct write in bytes; shorter ones are faster through the page cache.
    private static let shortest = 64 << 10

    private let file: Int32
    private var opened: Int32?
    private var queue: UInt?
    private var chooser: WritePathChooser

    /// - Parameter file: descriptor that stays open as long as this value.
    init(_ file: Int32, chooser: WritePathChooser = WritePathChooser()) {
        self.file = file
        self.chooser = chooser
    }

    deinit {
        if let queue { clinux_close_queue(queue) }
        if let opened { _ = Glibc.close(opened) }
    }

    /// Whether direct writes are worth a try: the file system of a regular file has blocks on a
    /// device of its own and writes directly without a detour.
    static func isPossible(_ file: Int32) -> Bool {
        // linux/magic.h: ext2 to ext4, XFS.
        [0xef53, 0x5846_5342].contains(clinux_file_system(file))
    }

    /// Whether a write is long enough, and aligned as O_DIRECT needs it.
    static func isFit(_ pieces: [UnsafeRawBufferPointer], at offset: Int64) -> Bool {
        let page = IOBuffer.alignment
        return offset % Int64(page) == 0 && pieces.reduce(0) { $0 + $1.count } >= shortest
            && pieces.allSatisfy {
                $0.count % page == 0 && Int(bitPattern: $0.baseAddress) % page == 0
            }
    }

    /// The descriptor to write to directly now; nil if the page cache is to be used.
    var descriptor: Int32? {
        mutating get {
            guard chooser.isDirect else { return nil }
            if opened == nil {
                // By descriptor, because a staged file has no name.
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

    /// The descriptor and the kernel's queue for several direct writes at once; nil if the page
    /// cache is to be used, or the kernel grants no queue.
    var together: (descriptor: Int32, queue: UInt)? {
        mutating get {
            guard let descriptor, let queue else { return nil }
            return (descriptor, queue)
        }
    }

    mutating func giveUp() { chooser.settleForCache() }

    /// Gives up writing to several places at once, which is refused here.
    mutating func giveUpTogether() {
        if let queue { clinux_close_queue(queue) }
        queue = nil
    }

    mutating func note(bytes: Int, time: Duration) {
        chooser.note(bytes: bytes, time: Int64(time / .nanoseconds(1)))
    }
}
