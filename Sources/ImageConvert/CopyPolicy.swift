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

    /// - Parameter offset: of what the target's `readsAsZero` does not change in, in bytes.
    public func action(for content: Mapping.Content, at offset: Int64) -> CopyAction {
        let readsAsZero = offset >= target.readsAsZeroFrom
        return switch content {
        // What is missing is an error to be found by reading.
        case .data, .compressed, .missing: .copy
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
