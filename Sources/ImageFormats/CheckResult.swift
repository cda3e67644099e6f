/// What a check of an image found and repaired.
public struct CheckResult: Sendable, Equatable {
    /// Where the last used cluster ends, in bytes; 0 if that is not known.
    public var imageEndOffset: Int64 = 0
    /// Clusters of the guest disk.
    public var totalClusters: Int64 = 0
    /// What could not be looked at.
    public var checkErrors: Int64 = 0
    /// Damage that is in the image still.
    public var corruptions: Int64 = 0
    /// Host clusters whose refcount is higher than the number of references to them.
    public var leaks: Int64 = 0
    public var corruptionsFixed: Int64 = 0
    public var leaksFixed: Int64 = 0
    /// Guest clusters that have a host cluster or a compressed stream.
    public var allocatedClusters: Int64 = 0
    /// Of these: not behind their neighbour in the file.
    public var fragmentedClusters: Int64 = 0
    public var compressedClusters: Int64 = 0

    public init() {}

    /// Puts what was found in one part to what was found before.
    mutating func add(_ counts: DamageCounts) {
        checkErrors += counts.checkErrors
        corruptions += counts.corruptions
        leaks += counts.leaks
        corruptionsFixed += counts.corruptionsFixed
        leaksFixed += counts.leaksFixed
    }
}

/// How much is wrong, and how much has been put right.
struct DamageCounts: Sendable, Equatable {
    var checkErrors: Int64 = 0
    var corruptions: Int64 = 0
    var leaks: Int64 = 0
    var corruptionsFixed: Int64 = 0
    var leaksFixed: Int64 = 0
}

/// What a check may repair.
public enum CheckRepair: String, Sendable {
    /// Refcounts that are too high: nothing is lost if the check erred on the side of the image.
    case leaks
    /// Everything that can be.
    case all
}
