/// The findings and repairs of an image check.
public struct CheckResult: Sendable, Equatable {
    /// End of the last used cluster in bytes; 0 if unknown.
    public var imageEndOffset: Int64 = 0
    /// Number of clusters of the guest disk.
    public var totalClusters: Int64 = 0
    /// Number of refcounts and tables that the check could not read or write.
    public var checkErrors: Int64 = 0
    /// Number of errors that are still in the image.
    public var corruptions: Int64 = 0
    /// Number of host clusters whose refcount is higher than the number of references to them.
    public var leaks: Int64 = 0
    public var corruptionsFixed: Int64 = 0
    public var leaksFixed: Int64 = 0
    /// Number of guest clusters that have a host cluster or a compressed stream.
    public var allocatedClusters: Int64 = 0
    /// Number of allocated clusters that do not directly follow their predecessor in the file.
    public var fragmentedClusters: Int64 = 0
    public var compressedClusters: Int64 = 0

    /// Adds the counts of one part of the check.
    mutating func add(_ counts: DamageCounts) {
        checkErrors += counts.checkErrors
        corruptions += counts.corruptions
        leaks += counts.leaks
        corruptionsFixed += counts.corruptionsFixed
        leaksFixed += counts.leaksFixed
    }
}

/// Numbers of errors found and repaired by one part of a check.
struct DamageCounts: Sendable, Equatable {
    var checkErrors: Int64 = 0
    var corruptions: Int64 = 0
    var leaks: Int64 = 0
    var corruptionsFixed: Int64 = 0
    var leaksFixed: Int64 = 0
}

/// The errors that a repair is allowed to correct.
public enum CheckRepair: String, Sendable {
    /// Refcounts that are too high, which only waste space.
    case leaks
    /// Everything that can be repaired.
    case all
}
