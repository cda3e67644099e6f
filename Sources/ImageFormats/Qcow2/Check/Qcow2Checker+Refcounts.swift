import Concurrency
import DiskImage
import Glibc
import ImageStorage

// Comparing refcounts with references.
extension Qcow2Checker {
    /// Number of clusters that a child task compares at a time, in whole blocks.
    private static let clustersPerComparison = 1 << 15

    private struct Comparison: Sendable {
        var clusters: Range<Int>
        /// nil if the table names an unaligned place for the block.
        var found: RefcountComparison?
    }

    /// - Parameter repair: the mismatches to repair; those without a refcount block are not
    ///   repaired.
    func compareRefcounts(repair: CheckRepair?) async throws {
        lastUsedCluster = 0
        let step = max(refcounts.clustersPerBlock, Self.clustersPerComparison)
        let starts = stride(from: 0, to: counts.clusterCount, by: step)
        let (refcounts, counts) = (refcounts, counts)
        try await inOrder(starts, width: batchesInFlight) { start in
            try Task.checkCancellation()
            try MemoryMargin.check()
            return try await Self.compare(
                start..<min(start + step, counts.clusterCount), refcounts, counts)
        } use: { comparisons in
            for comparison in comparisons { try await self.apply(comparison, repair) }
        }
    }

    /// One comparison for each block of a range of clusters.
    private static func compare(
        _ clusters: Range<Int>, _ refcounts: RefcountReader, _ counts: ReferenceCounts
    ) async throws -> [Comparison] {
        var comparisons: [Comparison] = []
        let perBlock = refcounts.clustersPerBlock
        for first in stride(from: clusters.lowerBound, to: clusters.upperBound, by: perBlock) {
            let part = first..<min(first + perBlock, clusters.upperBound)
            let block = try await refcounts.block(first / perBlock)
            comparisons.append(
                Comparison(
                    clusters: part,
                    found: block.map { RefcountComparison($0, part, with: counts) }))
        }
        return comparisons
    }

    private func apply(_ comparison: Comparison, _ repair: CheckRepair?) async throws {
        guard let found = comparison.found else { return reportUnaligned(comparison.clusters) }
        if let last = found.lastUsed { lastUsedCluster = last }
        if found.contradictsMarks { needsCopiedPass = true }
        var fixed: [RefcountComparison.Mismatch] = []
        for mismatch in found.mismatches {
            let isLeak = mismatch.refcount > mismatch.references
            let isFixed =
                mismatch.refcount > 0
                && (isLeak ? repair != nil : repair == .all)
            if mismatch.refcount == 0 { needsRebuild = true }
            let verb = isFixed ? "Repairing" : isLeak ? "Leaked" : "ERROR"
            say(
                "\(verb) cluster \(mismatch.cluster) refcount=\(mismatch.refcount) "
                    + "reference=\(mismatch.references)")
            switch (isFixed, isLeak) {
            case (true, true): damage.leaksFixed += 1
            case (true, false): damage.corruptionsFixed += 1
            case (false, true): damage.leaks += 1
            case (false, false): damage.corruptions += 1
            }
            if isFixed { fixed.append(mismatch) }
        }
        if !fixed.isEmpty { try await writeRefcounts(fixed) }
    }

    private func reportUnaligned(_ clusters: Range<Int>) {
        if !hasReportedUnalignedBlock {
            hasReportedUnalignedBlock = true
            let index = clusters.lowerBound / refcounts.clustersPerBlock
            let offset = refcounts.blockOffset(index)
            say(
                "qcow2: Image is corrupt: Refblock offset 0x\(offset.hexadecimal) unaligned "
                    + "(reftable index: \(index == 0 ? "0" : "0x" + index.hexadecimal)); further "
                    + "non-fatal corruption events will be suppressed")
        }
        let reason = String(cString: strerror(EIO))
        for cluster in clusters {
            damage.checkErrors += 1
            say("Can't get refcount for cluster \(cluster): \(reason)")
        }
    }
}
