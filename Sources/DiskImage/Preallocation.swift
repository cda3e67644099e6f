/// qemu's modes for the share of a new image, or of a new part, that takes space at once.
public enum Preallocation: String, Sendable, CaseIterable {
    /// Nothing.
    case off
    /// The tables of the format: every guest cluster has a place, which may be a hole in the file.
    case metadata
    /// Blocks are reserved; they read as zeros without having been written.
    case falloc
    /// Zeros are written.
    case full

    /// Whether blocks of the file are taken, not only places in it.
    public var takesBlocks: Bool { self == .falloc || self == .full }
}
