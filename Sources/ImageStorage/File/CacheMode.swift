import CLinux

/// qemu's cache modes, as `-t` and `-T` name them.
public enum CacheMode: String, Sendable, CaseIterable {
    /// Past the page cache; success means the disk has it.
    case none
    /// Every write reaches stable storage before it counts as done.
    case writethrough
    /// Through the page cache; success means the disk has it.
    case writeback
    /// Past the page cache, and every write reaches stable storage before it counts as done.
    case directsync
    /// Nobody waits for what a disk keeps to itself, as with `cp`; through the page cache, or past it where that is faster.
    case unsafe

    var isDirect: Bool { self == .none || self == .directsync }

    public var isSynchronous: Bool { self == .writethrough || self == .directsync }

    /// Whether a flush has to reach the disk.
    var flushes: Bool { self != .unsafe }

    var openFlags: Int32 {
        (isDirect ? clinux_O_DIRECT : 0) | (isSynchronous ? clinux_O_DSYNC : 0)
    }
}
