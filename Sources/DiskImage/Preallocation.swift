/// How much of a new image, or of a new part of one, takes its place at once. By qemu's names.
public enum Preallocation: String, Sendable, CaseIterable {
    /// Nothing.
    case off
    /// The tables of the format: every guest cluster has a place, which may be a hole of the file.
    case metadata
    /// Blocks are reserved; they read as zeros without having been written.
    case falloc
    /// Zeros are written.
    case full

    /// Blocks of the file are taken, not only places in it.
    public var takesBlocks: Bool { self == .falloc || self == .full }
}
