import DiskImage

/// The action for a range of the guest disk.
public enum CopyAction: Sendable, Equatable {
    /// The target already reads as it should.
    case skip
    /// The target is made to read as zeros; the source is not read.
    case zero
    /// The source is read, searched for zeros and written.
    case copy
    /// The target takes over the source's blocks unread; the rest is copied.
    case share
}

/// Decides from metadata alone whether a range is skipped, zeroed or copied. Whether a copy can be
/// shared is for `ExtentIterator` to see. Pure.
public struct CopyPolicy: Sendable {
    let target: TargetTraits
    /// Zeros are stored like data (`-S 0`).
    let storesZeros: Bool

    public init(target: TargetTraits, storesZeros: Bool) {
        self.target = target
        self.storesZeros = storesZeros
    }

    /// - Parameter offset: guest offset in bytes of a range that lies on one side of
    ///   `readsAsZeroFrom`.
    public func action(for content: Mapping.Content, at offset: Int64) -> CopyAction {
        let readsAsZero = offset >= target.readsAsZeroFrom
        return switch content {
        // Reading reports missing clusters.
        case .data, .encrypted, .compressed, .marked, .missing: .copy
        // The target's backing file is trusted to hold what the source's holds.
        case .unallocated where target.hasBacking: .skip
        case .unallocated, .zero, .hole, .preallocated:
            if storesZeros {
                .copy
            } else if readsAsZero {
                .skip
            } else if target.canWriteZeroes {
                .zero
            } else {
                .copy
            }
        }
    }
}
