import CLinux
import Glibc

/// qemu's cache modes, as `-t` and `-T` name them.
public enum CacheMode: String, Sendable, CaseIterable {
    /// Bypasses the page cache; success means the disk has the data.
    case none
    /// Every write reaches stable storage before it counts as done.
    case writethrough
    /// Uses the page cache; success means the disk has the data.
    case writeback
    /// Bypasses the page cache, and every write reaches stable storage before it counts as done.
    case directsync
    /// Uses the page cache, and does not wait until the disk has the data, as with `cp`.
    case unsafe

    var isDirect: Bool { self == .none || self == .directsync }

    public var isSynchronous: Bool { self == .writethrough || self == .directsync }

    /// Whether a flush has to reach the disk.
    var flushes: Bool { self != .unsafe }

    var openFlags: Int32 { (isDirect ? clinux_O_DIRECT : 0) | bufferedOpenFlags }

    /// Flags for equally durable writes through the page cache.
    var bufferedOpenFlags: Int32 { isSynchronous ? O_DSYNC : 0 }
}
