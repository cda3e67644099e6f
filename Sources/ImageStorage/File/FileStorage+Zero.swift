import CLinux
import DiskImage
import Glibc

/// The means to make a range read as zeros without sending zeros.
enum ZeroMeans {
    case punchHole, zeroRange, punchThenAllocate, discard, deviceZeroOut
}

// The cheapest means come first, and one that has failed is not tried again on this file.
extension FileStorage {
    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard !range.isEmpty else { return }
        // A device takes whole sectors only; 4 KiB is a multiple of every sector size in use.
        let unit: Int64 = traits.isDevice ? 4096 : 1
        let start = range.lowerBound.roundedUp(to: unit)
        let end = range.upperBound.roundedDown(to: unit)
        guard start < end, zeroByMeans(start..<end, mayUnmap: mayUnmap) else {
            return try await writeZeros(range)
        }
        try await writeZeros(range.lowerBound..<start)
        try await writeZeros(end..<range.upperBound)
    }

    private func zeroByMeans(_ range: Range<Int64>, mayUnmap: Bool) -> Bool {
        for means in ladder(mayUnmap: mayUnmap) {
            if refusedZeroing.withLock({ $0.contains(means) }) { continue }
            if zero(range, by: means) { return true }
            refusedZeroing.withLock { _ = $0.insert(means) }
        }
        return false
    }

    private func ladder(mayUnmap: Bool) -> [ZeroMeans] {
        switch (traits.isDevice, mayUnmap) {
        // The kernel accepts PUNCH_HOLE on a device only if the range will read as zeros. It
        // accepts BLKDISCARD anyway, and only old kernels tell whether that zeroes.
        case (true, true): [.punchHole, .discard, .zeroRange, .deviceZeroOut]
        case (true, false): [.zeroRange, .deviceZeroOut]
        case (false, true): [.punchHole, .zeroRange]
        case (false, false): [.zeroRange, .punchThenAllocate]
        }
    }

    private func zero(_ range: Range<Int64>, by means: ZeroMeans) -> Bool {
        let length = Int64(range.count)
        // A network file system waits for these calls as for data, so they count as writes.
        func isDone(_ call: () -> Int32) -> Bool {
            Syscall.retry(noting: writeMeter.note, call) != nil
        }
        func allocate(_ mode: Int32) -> Bool {
            isDone { clinux_fallocate(descriptor, mode, range.lowerBound, length) }
        }
        let keepSize = clinux_FALLOC_FL_KEEP_SIZE
        switch means {
        case .punchHole: return allocate(clinux_FALLOC_FL_PUNCH_HOLE | keepSize)
        case .zeroRange: return allocate(clinux_FALLOC_FL_ZERO_RANGE | keepSize)
        case .punchThenAllocate:
            return allocate(clinux_FALLOC_FL_PUNCH_HOLE | keepSize) && allocate(keepSize)
        case .discard:
            return clinux_device_discard_zeroes(descriptor) != 0
                && isDone {
                    clinux_device_discard(descriptor, UInt64(range.lowerBound), UInt64(length))
                }
        case .deviceZeroOut:
            return isDone {
                clinux_device_zero(descriptor, UInt64(range.lowerBound), UInt64(length))
            }
        }
    }
}
