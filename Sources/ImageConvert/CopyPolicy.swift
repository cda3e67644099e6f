import DiskImage

/// What is to be done with a range of the guest disk. The one place where that is decided.
public enum CopyAction: Sendable, Equatable {
    /// Nothing: the target already reads as it should.
    case skip
    /// Make the target read as zeros, without reading the source.
    case zero
    /// Read the source, look at every byte, write.
    case copy
    /// Let the target take over the source's blocks unread; copy what it cannot.
    case share
}

/// Decides from metadata alone. Pure.
public struct CopyPolicy: Sendable {
    let target: TargetTraits
    /// Zeros are stored like data (`-S 0`).
    let storesZeros: Bool

    public init(target: TargetTraits, storesZeros: Bool) {
        self.target = target
        self.storesZeros = storesZeros
    }

    /// - Parameter extent: within it the target's `readsAsZero` does not change.
    public func action(for content: Extent.Content, at offset: Int64) -> CopyAction {
        let readsAsZero = offset >= target.readsAsZeroFrom
        return switch content {
        case .data, .compressed: .copy
        // The target's backing file is trusted to hold what the source's holds.
        case .backing where target.hasBacking: .skip
        case .backing, .zero:
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
